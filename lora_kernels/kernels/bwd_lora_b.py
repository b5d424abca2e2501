"""Everything the backward needs from dy and B, from one read of dy.

    dyb[m, r] = scale * sum_n dy[m, n] B[n, r]      dB[n, r] = sum_m dy[m, n] xa[m, r]      db[n] = sum_m dy[m, n]

The two products reduce dy in different directions, so a program owns one column tile and a run of row tiles: it adds dB
and db over its rows in registers, and writes the column tile's share of dyb for each row tile. Grid (column tiles, row
splits, rank tiles). All shares are fp32 and added in fixed order by one launch of `reduce_partials`: no atomics, the
same bits each time.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels.device import kahan_add, low_rank_dot
from lora_kernels.kernels.launch import ceil_div, launch, split_in_blocks
from lora_kernels.kernels.reduce_partials import Reduction, reduce_partials
from lora_kernels.planning.tiles import Tile


@triton.jit
def store_share(dyb_ptr, dy, b, offs, mask, PRECISION: tl.constexpr):
    """This column tile's share of dyb, dy [BLOCK_M, BLOCK_N] times b [BLOCK_N, BLOCK_R]."""
    acc = tl.zeros((dy.shape[0], b.shape[1]), tl.float32)
    tl.store(dyb_ptr + offs, low_rank_dot(dy, b, acc, PRECISION), mask=mask)


@triton.jit(do_not_specialize=["M"])  # one binary for every number of tokens
def bwd_lora_b_kernel(
    dy_ptr, b_ptr, xa_ptr, dyb_ptr, d_b_ptr, d_bias_ptr,
    M, N, R, rows_per_split,
    stride_dy_m, stride_dy_n, stride_b_n, stride_b_r,
    NEEDS_DYB: tl.constexpr, NEEDS_D_B: tl.constexpr, NEEDS_D_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # With dyb first, the assembler waits for each single wgmma of both products. The other order takes more registers:
    # in fp32, and at ranks for which a plan reads dy twice anyway, some GPU's tile spills.
    IS_MIXED: tl.constexpr = dy_ptr.dtype.element_ty != b_ptr.dtype.element_ty
    DYB_LAST: tl.constexpr = (dy_ptr.dtype.element_ty != tl.float32) and not IS_MIXED and BLOCK_R <= 32
    pid_n, pid_split, pid_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_n, mask_r = offs_n < N, offs_r < R
    row_begin = pid_split * rows_per_split
    row_end = tl.minimum(row_begin + rows_per_split, M)

    if NEEDS_DYB:
        b_ptrs = b_ptr + offs_n.to(tl.int64)[:, None] * stride_b_n + offs_r.to(tl.int64)[None, :] * stride_b_r
        b = tl.load(b_ptrs, mask=mask_n[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_N, BLOCK_R]
        dyb_ptr += pid_n.to(tl.int64) * M * R
    acc_b = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    acc_bias = tl.zeros((BLOCK_N,), tl.float32)
    lost_bias = tl.zeros((BLOCK_N,), tl.float32)
    for row in range(row_begin, row_end, BLOCK_M):
        offs_m = row + tl.arange(0, BLOCK_M)
        mask_m = offs_m < row_end
        rows = offs_m.to(tl.int64)
        # [BLOCK_M, BLOCK_N]
        dy = tl.load(
            dy_ptr + rows[:, None] * stride_dy_m + offs_n.to(tl.int64)[None, :] * stride_dy_n,
            mask=mask_m[:, None] & mask_n[None, :],
            other=0.0,
        )
        offs_rank = rows[:, None] * R + offs_r[None, :]
        mask_rank = mask_m[:, None] & mask_r[None, :]
        if NEEDS_DYB and not DYB_LAST:
            store_share(dyb_ptr, dy, b, offs_rank, mask_rank, PRECISION)
        if NEEDS_D_B:
            xa = tl.load(xa_ptr + offs_rank, mask=mask_rank, other=0.0)  # [BLOCK_M, BLOCK_R]
            acc_b = low_rank_dot(tl.trans(dy), xa, acc_b, PRECISION)
        if NEEDS_DYB and DYB_LAST:
            store_share(dyb_ptr, dy, b, offs_rank, mask_rank, PRECISION)
        if NEEDS_D_BIAS:
            acc_bias, lost_bias = kahan_add(acc_bias, lost_bias, tl.sum(dy.to(tl.float32), axis=0))

    if NEEDS_D_B:
        d_b_ptrs = d_b_ptr + pid_split.to(tl.int64) * N * R + offs_n.to(tl.int64)[:, None] * R + offs_r[None, :]
        tl.store(d_b_ptrs, acc_b, mask=mask_n[:, None] & mask_r[None, :])
    if NEEDS_D_BIAS:
        tl.store(d_bias_ptr + pid_split.to(tl.int64) * N + offs_n, acc_bias, mask=mask_n & (pid_r == 0))


class LoRABGradients(NamedTuple):
    """What one read of dy yields; None where it was not asked for."""

    dyb: Tensor | None
    d_lora_B: Tensor | None
    d_bias: Tensor | None


def bwd_lora_b(
    *,
    dy: Tensor,
    lora_B: Tensor,
    xa: Tensor | None,
    bias_dtype: torch.dtype | None,
    needs_dyb: bool,
    scale: float,
    gain: float = 1.0,
    splits: int,
    precision: str,
    tile: Tile,
) -> LoRABGradients:
    """dyb [M, R] and d_lora_B [N, R] in lora_B's dtype, d_bias [N] in bias_dtype; xa None: no d_lora_B.

    gain: what an fp16 xa leaves out (`ops._scale`), put back into d_lora_B.
    """
    (m, n), r = dy.shape, lora_B.shape[1]
    rows_per_split, splits = split_in_blocks(m, splits, tile.block_m)
    columns = ceil_div(n, tile.block_n)

    def shares(count: int, *shape: int) -> Tensor:
        return torch.empty((count, *shape), dtype=torch.float32, device=dy.device)

    dyb = shares(columns, m, r) if needs_dyb else None
    d_lora_B = shares(splits, n, r) if xa is not None else None
    d_bias = shares(splits, n) if bias_dtype is not None else None
    grid = (columns, splits, ceil_div(r, tile.block_r))
    launch(
        bwd_lora_b_kernel, grid,
        dy, lora_B, xa, dyb, d_lora_B, d_bias,
        m, n, r, rows_per_split,
        *dy.stride(), *lora_B.stride(),
        NEEDS_DYB=needs_dyb, NEEDS_D_B=xa is not None, NEEDS_D_BIAS=bias_dtype is not None, PRECISION=precision,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_R=tile.block_r,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip

    def reduction(partials: Tensor | None, scale: float, dtype: torch.dtype | None) -> Reduction | None:
        if partials is None:
            return None
        return Reduction(partials, torch.empty(partials.shape[1:], dtype=dtype, device=dy.device), scale)

    found = (
        reduction(dyb, scale, lora_B.dtype),
        reduction(d_lora_B, gain, lora_B.dtype),
        reduction(d_bias, 1.0, bias_dtype),
    )
    reduce_partials([reduction for reduction in found if reduction is not None])
    return LoRABGradients(*(None if reduction is None else reduction.out for reduction in found))
