"""Seeded inputs of a LoRA branch, and one run of it: y and every gradient by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_kernels.functional.branch import lora_branch
from lora_kernels.ops import BRANCH, BranchNeeds
from lora_kernels.planning import BranchPlan
from lora_kernels.testing.linear import make_linear_inputs
from lora_kernels.testing.operation import CallInputs, run_operation, run_plan

BRANCH_TENSORS = ("base_out", "x", "lora_A", "lora_B")


@dataclass(frozen=True, kw_only=True)
class BranchInputs(CallInputs):
    """Arguments of one `lora_branch`."""

    base_out: Tensor
    x: Tensor
    lora_A: Tensor
    lora_B: Tensor


def make_branch_inputs(
    m: int,
    n: int,
    k: int,
    r: int,
    *,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    scaling: float = 2.0,
    dropout_p: float = 0.0,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> BranchInputs:
    """Normal random inputs of [m, k] → [m, n] at rank r, scaled so that base_out and the LoRA term are comparable.

    x, adapters and dy are those of `make_linear_inputs` for the same seed; base_out is drawn by itself. out_dtype is
    base_out's and dy's; None: x's.
    """
    out_dtype = dtype if out_dtype is None else out_dtype
    wide = make_linear_inputs(
        m, n, k, r, dtype=torch.float64, bias=False, scaling=scaling, dropout_p=dropout_p, seed=seed
    )
    base_out = torch.randn(m, n, generator=torch.Generator().manual_seed(~seed), dtype=torch.float64)
    adapter_dtype = dtype if adapter_dtype is None else adapter_dtype
    return BranchInputs(
        base_out=base_out.to(device, out_dtype),
        x=wide.x.to(device, dtype),
        lora_A=wide.lora_A.to(device, adapter_dtype),
        lora_B=wide.lora_B.to(device, adapter_dtype),
        dy=wide.dy.to(device, out_dtype),
        scaling=scaling,
        dropout_p=dropout_p,
        dropout_seed=seed,
    )


def run_branch(
    inputs: BranchInputs,
    backend: str,
    *,
    requires_grad: tuple[str, ...] = BRANCH_TENSORS,
    function: Callable[..., Tensor] = lora_branch,
) -> dict[str, Tensor]:
    """One forward and backward: {"y": ..., "d_x": ..., "d_lora_A": ..., ...} for the tensors in requires_grad.

    `function` is called as lora_branch is; pass a compiled or wrapped one to hold it against the plain call.
    """
    return run_operation(BRANCH, function, inputs, backend, requires_grad)


def run_branch_plan(inputs: BranchInputs, plan: BranchPlan, needs: BranchNeeds | None = None) -> dict[str, Tensor]:
    """One forward and backward as `plan` says, whatever the planner would choose: names as in `run_branch`.

    base_out's gradient is dy and no business of a plan: it is left out.
    """
    return run_plan(BRANCH, inputs, plan, needs)
