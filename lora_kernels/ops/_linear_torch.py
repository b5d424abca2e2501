"""The `torch` backend of the LoRA linear: library GEMMs in their accumulating forms, on any device torch has.

    xa = alpha (mask * x) A^T      y = (b + xa B^T), then y += x W^T in the GEMM
    dyb = alpha dy B               dx = mask * (dyb A), then dx += dy W in the GEMM

with alpha = scaling / (1 - p). The expand goes first and the base GEMM accumulates on top: y is read and written once
less than in the eager chain, and is rounded after its large term rather than before. The rank-sized products are
`low_rank_torch`'s; where those go by blocks of rows, so does what is made of them here. Only a tensor that fits one
block is ever copied to fp32 as a whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.ops import low_rank_torch as low_rank
from lora_kernels.ops._needs import Needs
from lora_kernels.ops._scale import scale_of
from lora_kernels.ops.low_rank_torch import block_buffer, row_blocks, scaled_mm, shrink, wide
from lora_kernels.planning import Plan

# fp32 copy of the weight that "upcast" holds at a time: 32 MiB.
WEIGHT_BLOCK_ELEMENTS = 1 << 23


def forward(
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
    """(y [M, N], xa [M, R]) for x [M, K]; xa in lora_A's dtype with alpha inside."""
    m, n = x.shape[0], weight.shape[0]
    inside, gain = scale_of(seed, scaling, dropout_p, lora_A.dtype)
    xa = shrink(x, lora_A, seed, dropout_p, inside, upcast=plan.strategy == "upcast")
    s, expand, bias = _fold_bias(xa, lora_B, bias, gain)
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if plan.strategy == "upcast":
        _upcast_gemm(x, weight.T, y, s, expand.T, gain)
        return y, xa
    if xa.dtype != x.dtype:
        wide_bias = None if bias is None else bias.to(xa.dtype)
        for rows in row_blocks(y):
            y[rows] = torch.mm(s[rows], expand.T) if wide_bias is None else torch.addmm(wide_bias, s[rows], expand.T)
    elif bias is None:
        scaled_mm(s, expand.T, gain, y)
    else:
        torch.addmm(bias, s, expand.T, alpha=gain, out=y)
    return y.addmm_(x, weight.T), xa


def _fold_bias(xa: Tensor, lora_B: Tensor, bias: Tensor | None, gain: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """([xa | 1 / gain], [lora_B | bias], None) on a CPU: the bias as one more rank. On a GPU, which adds it, unchanged.

    A CPU's addmm copies the bias into every row of y first: 1.6 times as long (`bench.choices`).
    """
    if bias is None or xa.device.type != "cpu":
        return xa, lora_B, bias
    folded = torch.cat([xa, xa.new_full((xa.shape[0], 1), 1.0 / gain)], 1)
    return folded, torch.cat([lora_B, bias.to(lora_B.dtype)[:, None]], 1), None


def _upcast_gemm(
    lhs: Tensor, rhs: Tensor, out: Tensor, s: Tensor | None = None, e: Tensor | None = None, gain: float = 1.0
) -> None:
    """out = lhs rhs + gain s e in fp32 over blocks of out, each rounded once; without s and e, out += lhs rhs."""
    k, n = rhs.shape
    wide_s, wide_e = (None, None) if s is None or e is None else (s.float() * gain, e.float())
    step_n = min(n, max(256, WEIGHT_BLOCK_ELEMENTS // k))
    lhs_buffer, out_buffer = block_buffer(lhs), block_buffer(lhs, step_n)
    for start_n in range(0, n, step_n):
        columns = slice(start_n, min(start_n + step_n, n))
        wide_rhs = rhs[:, columns].float()
        for rows in row_blocks(lhs, step_n):
            block = out_buffer[: rows.stop - rows.start, : columns.stop - columns.start]
            if wide_s is None or wide_e is None:
                block.copy_(out[rows, columns])
            else:
                torch.mm(wide_s[rows], wide_e[:, columns], out=block)
            out[rows, columns] = block.addmm_(wide(lhs[rows], lhs_buffer), wide_rhs)


def backward(
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
    """Gradients of x, weight, lora_A, lora_B, bias; None where not needed. What a needed one reads is there."""
    upcast = plan.backward_way.strategy == "upcast"
    dx, d_lora_A, d_lora_B, d_bias = low_rank.backward(
        dy, x if needs.lora_A else None, lora_A, lora_B, xa if needs.lora_B else None, seed, scaling, dropout_p,
        needs_x=needs.x, x_dtype=dy.dtype, upcast=upcast,
        bias_dtype=torch.promote_types(dy.dtype, lora_A.dtype) if needs.bias else None,
    )  # fmt: skip
    if dx is not None:
        assert weight is not None
        if upcast:
            _upcast_gemm(dy, weight, dx)
        else:
            dx.addmm_(dy, weight)
    d_weight = None
    if needs.weight:
        assert x is not None
        d_weight = torch.mm(dy.T, x)
    return dx, d_weight, d_lora_A, d_lora_B, d_bias
