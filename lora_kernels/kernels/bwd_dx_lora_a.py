"""What the backward under dropout makes of the mask: the low-rank part of dx and the gradient of A, from one look.

    dx0[m, k] = gain mask(m, k) sum_r dyb[m, r] A[r, k]        dA[r, k] = gain sum_m dyb[m, r] mask(m, k) x[m, k]

Evaluating the mask costs more than either product at small ranks, and both need it for the same tile of x. The caller
adds the large GEMM onto dx0 (`dx0.addmm_(dy, W)`); scaling and 1 / (1 - p) are already inside dyb, but
for gain, as in `gemm_expand`.

Grid (column tiles of x, row splits, rank tiles). A program owns one column tile and a run of row tiles: it adds dA over
its rows in registers and writes dx0 row tile by row tile. One rank tile: A's columns are loaded once. Several, at ranks
whose sum does not fit registers: each accumulates its own rows of dA, evaluates the mask anew, and takes every n-th row
tile of dx0, over the whole rank, so that all work the same. fp32 shares of each row split are added in fixed order by
`reduce_partials`: no atomics, the same bits each time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels.device import expand_dot, keep_tile, load_seed, low_rank_dot, with_gain
from lora_kernels.kernels.launch import ceil_div, has_offset, launch, split_in_blocks
from lora_kernels.kernels.reduce_partials import Reduction, reduce_partials
from lora_kernels.planning.tiles import Tile


@triton.jit(do_not_specialize=["M", "threshold"])  # one binary for every number of tokens and every p
def bwd_dx_lora_a_kernel(
    x_ptr, dyb_ptr, a_ptr, seed_ptr, dx_ptr, d_a_ptr,
    M, K, R, rows_per_split, threshold, gain,
    stride_x_m, stride_x_k, stride_a_r, stride_a_k,
    HAS_OFFSET: tl.constexpr, NEEDS_D_A: tl.constexpr, ONE_RANK_TILE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_k, pid_split, pid_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    WIDE: tl.constexpr = a_ptr.dtype.element_ty != dx_ptr.dtype.element_ty
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_k, mask_r = offs_k < K, offs_r < R
    columns = offs_k.to(tl.int64)[None, :]
    row_begin = pid_split * rows_per_split
    row_end = tl.minimum(row_begin + rows_per_split, M)
    seed = load_seed(seed_ptr, HAS_OFFSET)
    a_ptrs = a_ptr + tl.arange(0, BLOCK_R).to(tl.int64)[:, None] * stride_a_r + columns * stride_a_k
    if ONE_RANK_TILE:
        a = tl.load(a_ptrs, mask=mask_r[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_R, BLOCK_K]

    acc_a = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for row in range(row_begin, row_end, BLOCK_M):
        offs_m = row + tl.arange(0, BLOCK_M)
        mask_m = offs_m < row_end
        rows = offs_m.to(tl.int64)[:, None]
        keep = keep_tile(seed, offs_m, pid_k * BLOCK_K, threshold, BLOCK_K)  # [BLOCK_M, BLOCK_K]
        # [BLOCK_M, BLOCK_R]
        dyb = tl.load(dyb_ptr + rows * R + offs_r[None, :], mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        if NEEDS_D_A:
            # [BLOCK_M, BLOCK_K]; what is dropped is not read either
            x = tl.load(
                x_ptr + rows * stride_x_m + columns * stride_x_k,
                mask=mask_m[:, None] & mask_k[None, :],
                other=0.0,
            )
            acc_a = low_rank_dot(tl.trans(tl.where(keep, x, 0.0)), dyb, acc_a, PRECISION)

        dx_ptrs = dx_ptr + rows * K + columns
        mask_dx = mask_m[:, None] & mask_k[None, :]
        if ONE_RANK_TILE:
            dx = expand_dot(dyb, a, tl.zeros((BLOCK_M, BLOCK_K), tl.float32), WIDE, PRECISION)
            dx = with_gain(dx, gain, dyb_ptr.dtype.element_ty)
            tl.store(dx_ptrs, tl.where(keep, dx.to(dx_ptr.dtype.element_ty), 0.0), mask=mask_dx)
        elif (row - row_begin) // BLOCK_M % tl.num_programs(2) == pid_r:
            dx = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            for r in range(0, R, BLOCK_R):
                each_r = r + tl.arange(0, BLOCK_R)
                s = tl.load(
                    dyb_ptr + rows * R + each_r[None, :], mask=mask_m[:, None] & (each_r[None, :] < R), other=0.0
                )
                e = tl.load(
                    a_ptrs + tl.cast(stride_a_r, tl.int64) * r,
                    mask=(each_r[:, None] < R) & mask_k[None, :],
                    other=0.0,
                )
                dx = expand_dot(s, e, dx, WIDE, PRECISION)
            dx = with_gain(dx, gain, dyb_ptr.dtype.element_ty)
            tl.store(dx_ptrs, tl.where(keep, dx.to(dx_ptr.dtype.element_ty), 0.0), mask=mask_dx)

    if NEEDS_D_A:
        d_a_ptrs = d_a_ptr + pid_split.to(tl.int64) * R * K + offs_r.to(tl.int64)[None, :] * K + offs_k[:, None]
        tl.store(d_a_ptrs, acc_a, mask=mask_k[:, None] & mask_r[None, :])


def bwd_dx_lora_a(
    *,
    x: Tensor | None,
    dyb: Tensor,
    lora_A: Tensor,
    seed: Tensor,
    threshold: int,
    gain: float = 1.0,
    dx_dtype: torch.dtype,
    splits: int,
    precision: str,
    tile: Tile,
) -> tuple[Tensor, Tensor | None]:
    """(dx0 [M, K] in dx_dtype, which is x's; d_lora_A [R, K] in dyb's dtype, the adapters'); x None: no d_lora_A."""
    (m, r), k = dyb.shape, lora_A.shape[1]
    rows_per_split, splits = split_in_blocks(m, splits, tile.block_m)
    dx = torch.empty((m, k), dtype=dx_dtype, device=dyb.device)
    partials = None if x is None else torch.empty((splits, r, k), dtype=torch.float32, device=dyb.device)
    grid = (ceil_div(k, tile.block_k), splits, ceil_div(r, tile.block_r))
    launch(
        bwd_dx_lora_a_kernel, grid,
        x, dyb, lora_A, seed, dx, partials,
        m, k, r, rows_per_split, threshold, gain,
        *((0, 0) if x is None else x.stride()), *lora_A.stride(),
        HAS_OFFSET=has_offset(seed), NEEDS_D_A=x is not None, ONE_RANK_TILE=r <= tile.block_r, PRECISION=precision,
        BLOCK_M=tile.block_m, BLOCK_K=tile.block_k, BLOCK_R=tile.block_r,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if partials is None:
        return dx, None
    d_lora_A = torch.empty((r, k), dtype=dyb.dtype, device=dyb.device)
    reduce_partials([Reduction(partials, d_lora_A, gain)])
    return dx, d_lora_A
