"""The gradient of A.

    dA[r, k] = gain sum_m dyb[m, r] mask(m, k) x[m, k]

Grid (column tiles of x, row splits, rank tiles). The product is taken as (mask * x)^T dyb, so that the long side fills
the matrix unit's M and the rank its N. fp32 shares of each row split, added in fixed order by `reduce_partials`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels.device import keep_tile, load_seed, low_rank_dot
from lora_kernels.kernels.launch import ceil_div, has_offset, launch, split_in_blocks
from lora_kernels.kernels.reduce_partials import Reduction, reduce_partials
from lora_kernels.planning.tiles import Tile


@triton.jit(do_not_specialize=["M", "threshold"])  # one binary for every number of tokens and every p
def bwd_lora_a_kernel(
    x_ptr, dyb_ptr, seed_ptr, d_a_ptr,
    M, K, R, rows_per_split, threshold,
    stride_x_m, stride_x_k,
    HAS_DROPOUT: tl.constexpr, HAS_OFFSET: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_k, pid_split, pid_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_k, mask_r = offs_k < K, offs_r < R
    row_begin = pid_split * rows_per_split
    row_end = tl.minimum(row_begin + rows_per_split, M)
    if HAS_DROPOUT:
        seed = load_seed(seed_ptr, HAS_OFFSET)

    acc = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for row in range(row_begin, row_end, BLOCK_M):
        offs_m = row + tl.arange(0, BLOCK_M)
        mask_m = offs_m < row_end
        rows = offs_m.to(tl.int64)
        # [BLOCK_M, BLOCK_K]
        x = tl.load(
            x_ptr + rows[:, None] * stride_x_m + offs_k.to(tl.int64)[None, :] * stride_x_k,
            mask=mask_m[:, None] & mask_k[None, :],
            other=0.0,
        )
        # [BLOCK_M, BLOCK_R]
        dyb = tl.load(dyb_ptr + rows[:, None] * R + offs_r[None, :], mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        if HAS_DROPOUT:
            x = tl.where(keep_tile(seed, offs_m, pid_k * BLOCK_K, threshold, BLOCK_K), x, 0.0)
        acc = low_rank_dot(tl.trans(x), dyb, acc, PRECISION)

    d_a_ptrs = d_a_ptr + pid_split.to(tl.int64) * R * K + offs_r.to(tl.int64)[None, :] * K + offs_k[:, None]
    tl.store(d_a_ptrs, acc, mask=mask_k[:, None] & mask_r[None, :])


def bwd_lora_a(
    *,
    x: Tensor,
    dyb: Tensor,
    seed: Tensor | None,
    threshold: int,
    gain: float = 1.0,
    splits: int,
    precision: str,
    tile: Tile,
) -> Tensor:
    """d_lora_A [R, K] in dyb's dtype, which is the adapters'; gain is what an fp16 dyb leaves out (`ops._scale`)."""
    (m, k), r = x.shape, dyb.shape[1]
    rows_per_split, splits = split_in_blocks(m, splits, tile.block_m)
    partials = torch.empty((splits, r, k), dtype=torch.float32, device=x.device)
    grid = (ceil_div(k, tile.block_k), splits, ceil_div(r, tile.block_r))
    launch(
        bwd_lora_a_kernel, grid,
        x, dyb, seed, partials,
        m, k, r, rows_per_split, threshold,
        *x.stride(),
        HAS_DROPOUT=seed is not None, HAS_OFFSET=has_offset(seed), PRECISION=precision,
        BLOCK_M=tile.block_m, BLOCK_K=tile.block_k, BLOCK_R=tile.block_r,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    d_lora_A = torch.empty((r, k), dtype=dyb.dtype, device=x.device)
    reduce_partials([Reduction(partials, d_lora_A, gain)])
    return d_lora_A
