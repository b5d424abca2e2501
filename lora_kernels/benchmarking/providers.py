"""The contenders: the frozen linear, the unfused chain, and this package's backends."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels.benchmarking.cases import LinearCase
from lora_kernels.config import INTERPRETED
from lora_kernels.functional.linear import lora_linear
from lora_kernels.planning.device import device_traits, triton_available
from lora_kernels.planning.problem import obstacle_to_triton

FROZEN = "frozen linear"
UNFUSED = "unfused chain"
SEED = 20210617  # of the dropout masks, on every provider that takes a seed


@dataclass(frozen=True)
class CaseInputs:
    """Operands of one case, on one device."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    dy: Tensor
    scaling: float
    _built: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @staticmethod
    def of(case: LinearCase, device: torch.device) -> CaseInputs:
        """Standard-normal x and dy, weights scaled so that the base output and the LoRA output are both O(1)."""
        generator = torch.Generator(device=device).manual_seed(0)

        def normal(rows: int, columns: int, std: float, dtype: torch.dtype, *, leaf: bool = False) -> Tensor:
            values = torch.randn(rows, columns, generator=generator, device=device, dtype=torch.float32)
            return values.mul_(std).to(dtype).requires_grad_(leaf and case.backward)

        base, adapter = case.torch_dtype, case.torch_adapter_dtype
        return CaseInputs(
            x=normal(case.M, case.K, 1.0, base, leaf=True),
            weight=normal(case.N, case.K, case.K**-0.5, base),
            lora_A=normal(case.R, case.K, case.K**-0.5, adapter, leaf=True),
            lora_B=normal(case.N, case.R, 0.5 * case.R**-0.5, adapter, leaf=True),
            bias=normal(1, case.N, 1.0, base)[0] if case.bias else None,
            dy=normal(case.M, case.N, 1.0, base),
            scaling=2.0,
        )

    def build(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What a contender makes once per case and calls many times, a module or a compiled function: `make()`."""
        if key not in self._built:
            self._built[key] = make()
        return self._built[key]

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What a fine-tuning step differentiates by."""
        return {"x": self.x, "lora_A": self.lora_A, "lora_B": self.lora_B}

    @property
    def alive(self) -> tuple[Tensor, ...]:
        """Tensors that a training step holds anyway."""
        optional = () if self.bias is None else (self.bias,)
        return (self.x, self.weight, self.lora_A, self.lora_B, *optional)


def _always(case: LinearCase, device: torch.device) -> str | None:
    return None


@dataclass(frozen=True)
class Provider:
    """One contender.

    Attributes:
        name: as it stands in tables and records.
        forward: (inputs, dropout_p) → y.
        has_lora: False for the frozen linear, which is held against the base alone.
        seeded_mask: whether dropout follows this package's mask of `SEED`. A contender with a mask of its own is
            checked at p = 0, where there is one right answer, and timed with dropout on.
        casts_adapters: whether it multiplies fp32 adapters in x's 16-bit dtype by design, as under autocast. Its budget
            is then twice the error of the eager chain that does so, too.
        why_not: (case, device) → the reason why it cannot run there, or None.
    """

    name: str
    forward: Callable[[CaseInputs, float], Tensor]
    has_lora: bool = True
    seeded_mask: bool = False
    casts_adapters: bool = False
    why_not: Callable[[LinearCase, torch.device], str | None] = _always


def unfused_chain(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """The LoRA layer as PEFT's design has it: one eager operation after another.

    result = base(x);  result = result + lora_B(lora_A(dropout(x.to(lora_A.dtype)))) * scaling, in base(x)'s dtype.
    """
    result = F.linear(x, weight, bias)
    branch = x.to(lora_A.dtype)
    if dropout_p and training:  # PEFT puts an Identity in the dropout's place at p = 0
        branch = F.dropout(branch, dropout_p)
    branch = F.linear(F.linear(branch, lora_A), lora_B) * scaling
    return (result + branch).to(result.dtype)


def _frozen(inputs: CaseInputs, dropout_p: float) -> Tensor:
    return F.linear(inputs.x, inputs.weight, inputs.bias)


def _unfused(inputs: CaseInputs, dropout_p: float) -> Tensor:
    i = inputs
    return unfused_chain(i.x, i.weight, i.lora_A, i.lora_B, i.bias, scaling=i.scaling, dropout_p=dropout_p)


def _backend(name: str) -> Callable[[CaseInputs, float], Tensor]:
    def forward(inputs: CaseInputs, dropout_p: float) -> Tensor:
        return lora_linear(
            inputs.x,
            inputs.weight,
            inputs.lora_A,
            inputs.lora_B,
            inputs.bias,
            scaling=inputs.scaling,
            dropout_p=dropout_p,
            dropout_seed=SEED if dropout_p else None,
            backend=name,
        )

    return forward


def _no_triton(case: LinearCase, device: torch.device) -> str | None:
    if device.type == "cpu":
        return "needs a GPU (the interpreter checks the kernels, it does not time them)"
    arch = device_traits(device.type, device.index).arch
    return obstacle_to_triton(
        case.torch_dtype, arch, device.type, interpreted=INTERPRETED, triton_available=triton_available()
    )


FROZEN_LINEAR = Provider(FROZEN, _frozen, has_lora=False)
UNFUSED_CHAIN = Provider(UNFUSED, _unfused)
TORCH = Provider("torch", _backend("torch"), seeded_mask=True)
TRITON = Provider("triton", _backend("triton"), seeded_mask=True, why_not=_no_triton)
PROVIDERS = (FROZEN_LINEAR, UNFUSED_CHAIN, TORCH, TRITON)
