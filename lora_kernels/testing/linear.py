"""Seeded inputs of a LoRA linear, and one run of it: y and every gradient by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_kernels.functional.linear import lora_linear
from lora_kernels.ops import LINEAR, Needs
from lora_kernels.planning import Plan
from lora_kernels.testing.operation import CallInputs, run_operation, run_plan


@dataclass(frozen=True, kw_only=True)
class LinearInputs(CallInputs):
    """Arguments of one `lora_linear`."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None


def make_linear_inputs(
    m: int,
    n: int,
    k: int,
    r: int,
    *,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype | None = None,
    bias: bool = True,
    bias_dtype: torch.dtype | None = None,
    scaling: float = 2.0,
    dropout_p: float = 0.0,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> LinearInputs:
    """Normal random inputs of [m, k] → [m, n] at rank r, scaled so that base and low-rank term are comparable.

    Drawn in fp64 on the CPU and rounded once, so that a seed means the same numbers on every device and in every dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    adapter_dtype = dtype if adapter_dtype is None else adapter_dtype

    def normal(*shape: int, std: float, to: torch.dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(device, to)

    return LinearInputs(
        x=normal(m, k, std=1.0, to=dtype),
        weight=normal(n, k, std=k**-0.5, to=dtype),
        lora_A=normal(r, k, std=k**-0.5, to=adapter_dtype),
        lora_B=normal(n, r, std=r**-0.5, to=adapter_dtype),
        bias=normal(n, std=1.0, to=bias_dtype or dtype) if bias else None,
        dy=normal(m, n, std=1.0, to=dtype),
        scaling=scaling,
        dropout_p=dropout_p,
        dropout_seed=seed,
    )


ALL_PARAMETERS = ("x", "weight", "lora_A", "lora_B", "bias")


def run_linear(
    inputs: LinearInputs,
    backend: str,
    *,
    requires_grad: tuple[str, ...] = ALL_PARAMETERS,
    function: Callable[..., Tensor] = lora_linear,
) -> dict[str, Tensor]:
    """One forward and backward: {"y": ..., "d_x": ..., "d_lora_A": ..., ...} for the parameters in requires_grad.

    `function` is called as lora_linear is; pass a compiled or wrapped one to hold it against the plain call.
    """
    return run_operation(LINEAR, function, inputs, backend, requires_grad)


def run_linear_plan(inputs: LinearInputs, plan: Plan, needs: Needs | None = None) -> dict[str, Tensor]:
    """One forward and backward as `plan` says, whatever the planner would choose: names as in `run_linear`."""
    return run_plan(LINEAR, inputs, plan, needs)
