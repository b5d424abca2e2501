"""The `torch` backend of the LoRA branch: library GEMMs, on any device torch has.

    xa = alpha (mask * x) A^T      y = base_out + xa B^T, the sum in the GEMM
    dyb = alpha dy B               dx = mask * (dyb A)

with alpha = scaling / (1 - p). The rank-sized products are `low_rank_torch`'s; where dtypes differ or the plan says
"upcast", y is made by blocks of rows in fp32, too, each rounded once: nothing of its size is ever made in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.ops import low_rank_torch as low_rank
from lora_kernels.ops._needs import BranchNeeds
from lora_kernels.ops._scale import scale_of
from lora_kernels.ops.low_rank_torch import block_buffer, compute_dtype, row_blocks, shrink
from lora_kernels.planning import BranchPlan


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
    """(y [M, N] in base_out's dtype, xa [M, R] in lora_A's with alpha inside) for x [M, K]."""
    scale = scale_of(seed, scaling, dropout_p, lora_A.dtype)
    upcast = plan.strategy == "upcast"
    xa = shrink(x, lora_A, seed, dropout_p, scale.inside, upcast=upcast)
    if base_out.dtype == xa.dtype and not upcast:
        return torch.addmm(base_out, xa, lora_B.T, alpha=scale.gain), xa
    return _blockwise_expand(base_out, xa, lora_B.T, scale.gain), xa


def _blockwise_expand(base_out: Tensor, s: Tensor, e: Tensor, gain: float) -> Tensor:
    compute = compute_dtype(base_out, s)
    wide_e = e.to(compute)
    y = torch.empty(base_out.shape, dtype=base_out.dtype, device=base_out.device)
    buffer = None if y.dtype == compute else block_buffer(y, dtype=compute)
    for rows in row_blocks(y):
        block = y[rows] if buffer is None else buffer[: rows.stop - rows.start]
        block.copy_(base_out[rows]).addmm_(s[rows].to(compute), wide_e, alpha=gain)
        if buffer is not None:
            y[rows] = block
    return y


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
    """Gradients of x, lora_A, lora_B; None where not needed. What a needed one reads is there."""
    dx, d_lora_A, d_lora_B, _ = low_rank.backward(
        dy, x if needs.lora_A else None, lora_A, lora_B, xa if needs.lora_B else None, seed, scaling, dropout_p,
        needs_x=needs.x, x_dtype=x_dtype, upcast=plan.backward_way.strategy == "upcast",
    )  # fmt: skip
    return dx, d_lora_A, d_lora_B
