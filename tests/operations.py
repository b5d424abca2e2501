"""What the suites of tests/unit/test_operations.py know of each declared operation, besides its declaration."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels import LoRALinear, lora_branch, lora_linear
from lora_kernels.ops import BRANCH, LINEAR, Operation
from lora_kernels.testing import make_linear_inputs
from lora_kernels.testing.operation import CallInputs, run_operation
from tests import branch_cases, linear_cases

N, K, R = 12, 16, 4


class Branched(nn.Module):
    """A layer whose base is computed elsewhere, with its activation."""

    def __init__(self, p: float = 0.0, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.base, self.p = nn.Linear(K, N, dtype=dtype).requires_grad_(False), p
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(R, K)), nn.Parameter(torch.randn(N, R))

    def forward(self, x: Tensor) -> Tensor:
        p = self.p if self.training else 0.0
        return lora_branch(self.base(x), x, self.lora_A, self.lora_B, scaling=2.0, dropout_p=p).relu()


def _linear_layer(p: float = 0.0, dtype: torch.dtype | None = None) -> LoRALinear:
    options = {"r": R, "lora_alpha": R, "lora_dropout": p, "init_lora_weights": False}
    return LoRALinear(K, N, dtype=dtype, adapter_dtype=torch.float32, **options)


def _linear_inputs(m: int, dtypes: str, *, optional: bool = True, **options: Any) -> CallInputs:
    x, adapters = linear_cases.DTYPES[dtypes]
    return make_linear_inputs(m, N, K, R, dtype=x, adapter_dtype=adapters, bias=optional, **options)


def _branch_inputs(m: int, dtypes: str, *, optional: bool = True, **options: Any) -> CallInputs:
    return branch_cases.inputs_of((m, N, K), dtypes, R, **options)


@dataclass(frozen=True)
class Case:
    """An operation and what goes into it.

    Attributes:
        operation: the declaration.
        function: what users call.
        dtypes: names of combinations of dtypes.
        inputs: inputs(m, dtypes, optional=..., **options); optional=False leaves out every operand that may be.
        layer: layer(p, dtype), a module over the function, [*, K] -> [*, N].
        forward, backward: the schemas.
    """

    operation: Operation
    function: Callable[..., Tensor]
    dtypes: Mapping[str, Any]
    inputs: Callable[..., CallInputs]
    layer: Callable[..., nn.Module]
    forward: str
    backward: str

    @property
    def names(self) -> tuple[str, ...]:
        """Of the operands."""
        return tuple(operand.name for operand in self.operation.operands)

    def run(self, inputs: CallInputs, backend: str, *, requires_grad=None, function=None) -> dict[str, Tensor]:
        """y and the gradients by name."""
        return run_operation(self.operation, function or self.function, inputs, backend, requires_grad)

    def call(self, inputs: CallInputs, **options: Any) -> Callable[..., Tensor]:
        """The function with the inputs' operands."""
        return partial(self.function, *(getattr(inputs, name) for name in self.names), **options)

    def op_arguments(self, inputs: CallInputs, seed: Tensor | None, p: float) -> tuple[list[Any], list[Any]]:
        """Of the forward op, and of the backward op less needs and backend."""
        forward = [*(getattr(inputs, name) for name in self.names), seed, 2.0, p, "torch"]
        xa = self.operation.forward(*forward)[1]
        saved = [getattr(inputs, operand.name) for operand in self.operation.saved]
        own = [forward[place].dtype for place in self.operation.own_dtypes]
        return forward, [inputs.dy, *saved, xa, seed, 2.0, p, *own]

    @property
    def all_needs(self) -> list[list[bool]]:
        """Everything, each gradient alone, none, and all but the adapters' A."""
        gradients = [operand.name for operand in self.operation.gradients]
        alone = [[name == other for name in gradients] for other in gradients]
        return [[True] * len(gradients), *alone, [False] * len(gradients), [name != "lora_A" for name in gradients]]


CASES = {
    "linear": Case(
        LINEAR, lora_linear, linear_cases.DTYPES, _linear_inputs, _linear_layer,
        "lora_kernels::linear_forward(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, "
        "Tensor? seed, float scaling, float dropout_p, str backend) -> (Tensor, Tensor)",
        "lora_kernels::linear_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor lora_A, Tensor lora_B, Tensor? xa, "
        "Tensor? seed, float scaling, float dropout_p, bool[] needs, str backend) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    ),
    "branch": Case(
        BRANCH, lora_branch, branch_cases.DTYPES, _branch_inputs, Branched,
        "lora_kernels::branch_forward(Tensor base_out, Tensor x, Tensor lora_A, Tensor lora_B, Tensor? seed, "
        "float scaling, float dropout_p, str backend) -> (Tensor, Tensor)",
        "lora_kernels::branch_backward(Tensor dy, Tensor? x, Tensor lora_A, Tensor lora_B, Tensor? xa, Tensor? seed, "
        "float scaling, float dropout_p, ScalarType x_dtype, bool[] needs, str backend) -> (Tensor, Tensor, Tensor)",
    ),
}  # fmt: skip
