"""A GEMM with the LoRA expand folded into its epilogue, from pointers: any strides, any tail, any GPU.

    out = lhs rhs + bias + gain mask * (s e)

Grid (tiles of out), grouped for L2. One kernel serves both directions:

    forward   y  = x W^T + b + xa B^T          lhs = x,  rhs = W^T, s = xa,  e = B^T
    backward  dx = dy W + mask * (dyb A)       lhs = dy, rhs = W,   s = dyb, e = A

The expand comes after the main loop, where its tiles reuse the pipeline's shared memory. Scaling and 1 / (1 - p) are
already inside s, but for the power of two, gain, that an fp16 s leaves out (`ops._scale`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels.device import expand_into, grouped_tile, load_seed
from lora_kernels.kernels.launch import ceil_div, has_offset, launch
from lora_kernels.planning.tiles import Tile


@triton.jit(do_not_specialize=["M", "threshold"])  # one binary for every number of tokens and every p
def gemm_expand_kernel(
    lhs_ptr, rhs_ptr, s_ptr, e_ptr, bias_ptr, seed_ptr, out_ptr,
    M, N, K, R, threshold, gain,
    stride_lhs_m, stride_lhs_k, stride_rhs_k, stride_rhs_n, stride_s_m, stride_e_r, stride_e_n, stride_out_m,
    HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_OFFSET: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    lhs_ptrs = lhs_ptr + offs_m.to(tl.int64)[:, None] * stride_lhs_m + offs_k.to(tl.int64)[None, :] * stride_lhs_k
    rhs_ptrs = rhs_ptr + offs_k.to(tl.int64)[:, None] * stride_rhs_k + offs_n.to(tl.int64)[None, :] * stride_rhs_n

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        lhs = tl.load(lhs_ptrs, mask=(offs_m[:, None] < M) & mask_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        rhs = tl.load(rhs_ptrs, mask=mask_k[:, None] & (offs_n[None, :] < N), other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(lhs, rhs, acc, input_precision=PRECISION)
        lhs_ptrs += tl.cast(stride_lhs_k, tl.int64) * BLOCK_K
        rhs_ptrs += tl.cast(stride_rhs_k, tl.int64) * BLOCK_K

    seed = load_seed(seed_ptr, HAS_OFFSET) if HAS_DROPOUT else 0
    acc = expand_into(
        acc, s_ptr, e_ptr, seed, threshold, gain,
        M, N, R, offs_m, offs_n, pid_n * BLOCK_N,
        stride_s_m, stride_e_r, stride_e_n,
        HAS_DROPOUT, s_ptr.dtype.element_ty != out_ptr.dtype.element_ty, PRECISION, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out_ptr + offs_m.to(tl.int64)[:, None] * stride_out_m + offs_n[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(offs_m[:, None] < M) & (offs_n[None, :] < N),
    )


def gemm_expand(
    *,
    lhs: Tensor,
    rhs: Tensor,
    s: Tensor,
    e: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    threshold: int,
    gain: float = 1.0,
    precision: str,
    tile: Tile,
) -> Tensor:
    """lhs [M, K] @ rhs [K, N] + bias [N] + gain mask * (s [M, R] @ e [R, N]) in lhs's dtype; bias has unit stride."""
    (m, k), n = lhs.shape, rhs.shape[1]
    out = torch.empty((m, n), dtype=lhs.dtype, device=lhs.device)
    grid = (ceil_div(m, tile.block_m) * ceil_div(n, tile.block_n),)
    launch(
        gemm_expand_kernel, grid,
        lhs, rhs, s, e, bias, seed, out,
        m, n, k, s.shape[1], threshold, gain,
        *lhs.stride(), *rhs.stride(), s.stride(0), *e.stride(), n,
        HAS_BIAS=bias is not None, HAS_DROPOUT=seed is not None, HAS_OFFSET=has_offset(seed), PRECISION=precision,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BLOCK_R=tile.block_r, GROUP_M=tile.group_m,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out
