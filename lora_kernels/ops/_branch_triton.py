"""The `triton` backend of the LoRA branch: two kernels forward, two to four backward.

    xa = alpha (mask * x) A^T      shrink              y = base_out + xa B^T      expand
    dyb = alpha dy B, dB           bwd_lora_b; shrink  dA, dx = mask * (dyb A)    bwd_dx_lora_a; bwd_lora_a, expand

Without a mask dA and dx share nothing but dyb, which is small: one kernel for both would read and write what two do.
Imports `kernels`, hence triton; itself imported only inside the implementations in `ops.branch`.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from lora_kernels.kernels.replay import replayed
from lora_kernels.ops._needs import BranchNeeds
from lora_kernels.ops._scale import Scale
from lora_kernels.ops.low_rank_triton import (
    expanded,
    from_dy,
    gradient_of_lora_A,
    launch_scope,
    masked_dx_and_d_lora_A,
    threshold_and_scale,
    xa_of,
)
from lora_kernels.planning import BranchPlan, Plan


def _sides(plan: BranchPlan) -> tuple[Plan, Plan]:
    assert plan.x_side is not None and plan.out_side is not None
    return plan.x_side, plan.out_side


def forward(
    base_out: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    plan: BranchPlan,
) -> tuple[Tensor, Tensor]:
    """(y [M, N] in base_out's dtype, xa [M, R] in lora_A's with alpha inside) for x [M, K], M >= 1."""
    factors = threshold_and_scale(seed, scaling, dropout_p, lora_A)
    with launch_scope(x):
        return cast(tuple[Tensor, Tensor], replayed(_forward, (base_out, x, lora_A, lora_B, seed), factors, plan))


def _forward(
    base_out: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    threshold: int,
    scale: Scale,
    plan: BranchPlan,
) -> tuple[Tensor, Tensor]:
    x_side, out_side = _sides(plan)
    xa = xa_of(x, lora_A, seed, threshold, scale, x_side)
    return expanded(base_out, xa, lora_B.T, base_out.dtype, scale, out_side), xa


def backward(
    dy: Tensor,
    x: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    xa: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    x_dtype: torch.dtype,
    needs: BranchNeeds,
    plan: BranchPlan,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, lora_A, lora_B; None where not needed. What a needed one reads is there; M >= 1."""
    factors = threshold_and_scale(seed, scaling, dropout_p, lora_A)
    with launch_scope(dy):
        return replayed(_backward, (dy, x, lora_A, lora_B, xa, seed), (*factors, x_dtype, needs), plan)


def _backward(
    dy: Tensor,
    x: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    xa: Tensor | None,
    seed: Tensor | None,
    threshold: int,
    scale: Scale,
    x_dtype: torch.dtype,
    needs: BranchNeeds,
    plan: BranchPlan,
) -> tuple[Tensor | None, ...]:
    x_side, out_side = _sides(plan)
    dx = d_lora_A = None
    dyb, d_lora_B, _ = from_dy(
        dy, lora_B, xa if needs.lora_B else None, None, scale, out_side, needs_dyb=needs.x or needs.lora_A
    )
    if needs.x and seed is not None:
        assert dyb is not None
        lora_x = x if needs.lora_A else None
        dx, d_lora_A = masked_dx_and_d_lora_A(lora_x, dyb, lora_A, seed, threshold, scale, x_side, x_dtype)
    elif needs.lora_A:
        assert x is not None and dyb is not None
        d_lora_A = gradient_of_lora_A(x, dyb, seed, threshold, scale, x_side)
    if needs.x and dx is None:
        assert dyb is not None
        dx = expanded(None, dyb, lora_A, x_dtype, scale, x_side)
    return dx, d_lora_A, d_lora_B
