"""Shrink: the rank-sized product of the LoRA path.

    out[m, r] = scale * sum_k mask(m, k) x[m, k] A[r, k]

Grid (row tiles, rank tiles, splits of K). With one split the scaled result is rounded once to out's dtype; with more,
fp32 partial sums go to [splits, M, R] and `reduce_partials` adds them in fixed order. Called for xa in
the forward, and for dyb = scale * dy B (with A = B^T) where the rank is too wide to share dy's read with dB.

LAUNCHES_DEPENDENTS lets a dependent launch start once every program here has; it waits for the result by itself
(`gemm_expand_tma` says why that is safe).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from lora_kernels.kernels.device import keep_tile, load_seed, low_rank_dot, masked_dot
from lora_kernels.kernels.launch import ceil_div, has_offset, launch, split_in_blocks
from lora_kernels.kernels.reduce_partials import Reduction, reduce_partials
from lora_kernels.planning.tiles import Tile


@triton.jit(do_not_specialize=["M", "threshold"])  # one binary for every number of tokens and every p
def shrink_kernel(
    x_ptr, a_ptr, seed_ptr, out_ptr,
    M, K, R, k_per_split, scale, threshold,
    stride_x_m, stride_x_k, stride_a_r, stride_a_k,
    HAS_DROPOUT: tl.constexpr, HAS_OFFSET: tl.constexpr, IS_PARTIAL: tl.constexpr,
    LAUNCHES_DEPENDENTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    if LAUNCHES_DEPENDENTS:  # inline assembly: not for the interpreter, AMD, or GPUs before sm_90
        gdc_launch_dependents()
    pid_m, pid_r, pid_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    k_begin = pid_split * k_per_split
    k_end = tl.minimum(k_begin + k_per_split, K)
    if HAS_DROPOUT:
        seed = load_seed(seed_ptr, HAS_OFFSET)

    first_k = (k_begin + offs_k).to(tl.int64)
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * stride_x_m + first_k[None, :] * stride_x_k
    a_ptrs = a_ptr + offs_r.to(tl.int64)[None, :] * stride_a_r + first_k[:, None] * stride_a_k
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(k_begin, k_end, BLOCK_K):
        mask_k = offs_k < k_end - k
        x = tl.load(x_ptrs, mask=(offs_m[:, None] < M) & mask_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        a = tl.load(a_ptrs, mask=mask_k[:, None] & (offs_r[None, :] < R), other=0.0)  # [BLOCK_K, BLOCK_R]
        if HAS_DROPOUT:
            x = tl.where(keep_tile(seed, offs_m, k, threshold, BLOCK_K), x, 0.0)
            acc = masked_dot(x, a, acc, PRECISION)
        else:
            acc = low_rank_dot(x, a, acc, PRECISION)
        x_ptrs += tl.cast(stride_x_k, tl.int64) * BLOCK_K
        a_ptrs += tl.cast(stride_a_k, tl.int64) * BLOCK_K

    if IS_PARTIAL:
        out_ptr += pid_split.to(tl.int64) * M * R
    else:
        acc *= tl.cast(scale, tl.float32)
    tl.store(
        out_ptr + offs_m.to(tl.int64)[:, None] * R + offs_r[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(offs_m[:, None] < M) & (offs_r[None, :] < R),
    )


def shrink(
    *,
    x: Tensor,
    lora_A: Tensor,
    seed: Tensor | None,
    threshold: int,
    scale: float,
    splits: int,
    launches_dependents: bool = False,
    precision: str,
    tile: Tile,
) -> Tensor:
    """scale * (mask * x) @ lora_A.T as a contiguous [M, R] tensor in lora_A's dtype."""
    (m, k), r = x.shape, lora_A.shape[0]
    k_per_split, splits = split_in_blocks(k, splits, tile.block_k)
    out = torch.empty((m, r), dtype=lora_A.dtype, device=x.device)
    target = out if splits == 1 else torch.empty((splits, m, r), dtype=torch.float32, device=x.device)
    grid = (ceil_div(m, tile.block_m), ceil_div(r, tile.block_r), splits)
    launch(
        shrink_kernel, grid,
        x, lora_A, seed, target,
        m, k, r, k_per_split, scale, threshold,
        *x.stride(), *lora_A.stride(),
        HAS_DROPOUT=seed is not None, HAS_OFFSET=has_offset(seed), IS_PARTIAL=splits > 1,
        LAUNCHES_DEPENDENTS=launches_dependents and splits == 1, PRECISION=precision,
        BLOCK_M=tile.block_m, BLOCK_R=tile.block_r, BLOCK_K=tile.block_k,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if splits > 1:
        reduce_partials([Reduction(target, out, scale)], launches_dependents=launches_dependents)
    return out
