"""`lora_kernels::linear_forward` and `lora_kernels::linear_backward`: opaque to torch.compile, export and CUDA graphs.

They take [M, K] inputs that the caller has validated. The implementation makes the plan from the real sizes, so a
compiled graph with a dynamic M does not specialise on it.
Gradients that are not needed come back as empty tensors: a schema has no optional returns.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from lora_kernels import config
from lora_kernels.errors import UnsupportedError
from lora_kernels.ops import _linear_torch
from lora_kernels.ops._needs import Needs
from lora_kernels.planning import Plan, Problem, make_plan
from lora_kernels.planning.device import device_traits, triton_available

_LIBRARY = torch.library.Library("lora_kernels", "DEF")
_LIBRARY.define(
    "linear_forward(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, Tensor? seed, float scaling, "
    "float dropout_p, str backend) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "linear_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor lora_A, Tensor lora_B, Tensor? xa, Tensor? seed, "
    "float scaling, float dropout_p, bool[] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def problem_of(
    m: int,
    n: int,
    k: int,
    r: int,
    *,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    dropout: bool,
    device: torch.device,
) -> Problem:
    """The planner's view of one call on `device`."""
    # torch's stubs say int, but torch.device("cuda").index is None: the current device.
    index: Any = device.index
    if index is None and device.type == "cuda":
        index = torch.cuda.current_device()
    traits = device_traits(device.type, index)
    return Problem(
        m, n, k, r, dtype, adapter_dtype, dropout,
        arch=traits.arch,
        device_type=device.type,
        sm_count=traits.sm_count,
        tf32=device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32",
        interpreted=config.INTERPRETED,
    )  # fmt: skip


def _plan(t: Tensor, n: int, lora_A: Tensor, seed: Tensor | None, backend: str) -> Plan:
    r, k = lora_A.shape
    problem = problem_of(
        t.shape[0], n, k, r, dtype=t.dtype, adapter_dtype=lora_A.dtype, dropout=seed is not None, device=t.device
    )
    return make_plan(problem, backend, triton_available=triton_available())


class LinearImplementation(Protocol):
    """What a backend's module offers: both directions, under a plan that names it."""

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
        scaling: float,
        dropout_p: float,
        plan: Plan,
    ) -> tuple[Tensor, Tensor]:
        """(y [M, N], xa [M, R]) for x [M, K], M >= 1."""

    def backward(
        self,
        dy: Tensor,
        x: Tensor | None,
        weight: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        xa: Tensor | None,
        seed: Tensor | None,
        scaling: float,
        dropout_p: float,
        needs: Needs,
        plan: Plan,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight, lora_A, lora_B, bias; None where not needed."""


def linear_implementation(plan: Plan) -> LinearImplementation:
    """The module that serves a plan: for the ops below, and for checks that go through the strategies one by one."""
    if plan.backend == "triton":
        from lora_kernels.ops import _linear_triton

        return _linear_triton
    if plan.backend == "torch":
        return _linear_torch
    raise UnsupportedError(
        f"the registered op serves 'torch' and 'triton'; got {plan.backend!r}. Call lora_linear instead."
    )


def _without_autocast(t: Tensor) -> AbstractContextManager[object]:
    """Dtypes were settled above; autocast would cast the fp32 adapters' products again."""
    if torch.is_autocast_enabled(t.device.type):
        return torch.autocast(t.device.type, enabled=False)
    return nullcontext()


@torch.library.impl(_LIBRARY, "linear_forward", "CompositeExplicitAutograd")
@torch.no_grad()  # an exported program calls the op without the autograd.Function around it
def _forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0]), lora_A.new_empty(0, lora_A.shape[0])
    plan = _plan(x, weight.shape[0], lora_A, seed, backend)
    with _without_autocast(x):
        return linear_implementation(plan).forward(x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p, plan)


@torch.library.register_fake("lora_kernels::linear_forward", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _fake_forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    m = x.shape[0]
    return x.new_empty(m, weight.shape[0]), lora_A.new_empty(m, lora_A.shape[0])


@torch.library.impl(_LIBRARY, "linear_backward", "CompositeExplicitAutograd")
@torch.no_grad()
def _backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    xa: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    if dy.shape[0] == 0:
        empty = _fake_backward(dy, x, weight, lora_A, lora_B, xa, seed, scaling, dropout_p, needs, backend)
        return tuple(gradient.zero_() for gradient in empty)
    plan = _plan(dy, dy.shape[1], lora_A, seed, backend)
    with _without_autocast(dy):
        gradients = linear_implementation(plan).backward(
            dy, x, weight, lora_A, lora_B, xa, seed, scaling, dropout_p, Needs(*needs), plan
        )
    like = (dy, dy, lora_A, lora_B, dy)
    return tuple(t.new_empty(0) if found is None else found for found, t in zip(gradients, like, strict=True))


@torch.library.register_fake("lora_kernels::linear_backward", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _fake_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    xa: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    asked = Needs(*needs)
    (m, n), k = dy.shape, lora_A.shape[1]
    return (
        dy.new_empty((m, k) if asked.x else 0),
        dy.new_empty((n, k) if asked.weight else 0),
        lora_A.new_empty(lora_A.shape if asked.lora_A else 0),
        lora_B.new_empty(lora_B.shape if asked.lora_B else 0),
        dy.new_empty(n if asked.bias else 0),
    )


linear_forward = torch.ops.lora_kernels.linear_forward.default
linear_backward = torch.ops.lora_kernels.linear_backward.default
