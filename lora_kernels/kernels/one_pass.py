"""Base and low-rank product in one launch: the forward that reads x and W once.

    y = x W^T + b + xa B^T        xa = scale * (mask * x) A^T

Grid (tiles of y), grouped for L2. Each program accumulates its rows of x A^T beside its tile of x W^T in the same main
loop and expands them in the epilogue; the programs of the first column of tiles also store xa for the backward. The
low-rank product is repeated by every column of tiles, so this is the plan where the weight's bytes are the cost
(decode).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels.device import expand_dot, grouped_tile, keep_tile, low_rank_dot
from lora_kernels.kernels.launch import launch
from lora_kernels.planning.tiles import Tile


@triton.jit(do_not_specialize=["M", "threshold"])  # one binary for every number of tokens and every p
def one_pass_kernel(
    x_ptr, w_ptr, a_ptr, b_ptr, bias_ptr, seed_ptr, y_ptr, xa_ptr,
    M, N, K, R, scale, threshold,
    stride_x_m, stride_x_k, stride_w_n, stride_w_k, stride_a_r, stride_a_k, stride_b_n, stride_b_r,
    HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)
    rows, columns, wide_k = offs_m.to(tl.int64), offs_n.to(tl.int64), offs_k.to(tl.int64)
    x_ptrs = x_ptr + rows[:, None] * stride_x_m + wide_k[None, :] * stride_x_k
    w_ptrs = w_ptr + wide_k[:, None] * stride_w_k + columns[None, :] * stride_w_n
    a_ptrs = a_ptr + wide_k[:, None] * stride_a_k + offs_r.to(tl.int64)[None, :] * stride_a_r
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_xa = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs, mask=(offs_m[:, None] < M) & mask_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        w = tl.load(w_ptrs, mask=mask_k[:, None] & (offs_n[None, :] < N), other=0.0)  # [BLOCK_K, BLOCK_N]
        a = tl.load(a_ptrs, mask=mask_k[:, None] & (offs_r[None, :] < R), other=0.0)  # [BLOCK_K, BLOCK_R]
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        if HAS_DROPOUT:
            x = tl.where(keep_tile(seed, offs_m, k, threshold, BLOCK_K), x, 0.0)
        acc_xa = low_rank_dot(x, a, acc_xa, PRECISION)
        x_ptrs += tl.cast(stride_x_k, tl.int64) * BLOCK_K
        w_ptrs += tl.cast(stride_w_k, tl.int64) * BLOCK_K
        a_ptrs += tl.cast(stride_a_k, tl.int64) * BLOCK_K

    # The padded columns are Inf * 0 where x is Inf, and must not meet the padded rows of B. Scaled in fp32, rounded
    # once: what the backward will read is what this epilogue expands.
    acc_xa = tl.where(offs_r[None, :] < R, acc_xa, 0.0)
    xa = (acc_xa * tl.cast(scale, tl.float32)).to(xa_ptr.dtype.element_ty)  # [BLOCK_M, BLOCK_R]
    if pid_n == 0:
        xa_ptrs = xa_ptr + rows[:, None] * R + offs_r[None, :]
        tl.store(xa_ptrs, xa, mask=(offs_m[:, None] < M) & (offs_r[None, :] < R))
    # [BLOCK_R, BLOCK_N]
    b = tl.load(
        b_ptr + columns[None, :] * stride_b_n + offs_r.to(tl.int64)[:, None] * stride_b_r,
        mask=(offs_r[:, None] < R) & (offs_n[None, :] < N),
        other=0.0,
    )
    acc = expand_dot(xa, b, acc, xa_ptr.dtype.element_ty != y_ptr.dtype.element_ty, PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y_ptr + rows[:, None] * N + offs_n[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=(offs_m[:, None] < M) & (offs_n[None, :] < N),
    )


def one_pass(
    *,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    threshold: int,
    scale: float,
    precision: str,
    tile: Tile,
) -> tuple[Tensor, Tensor]:
    """(y [M, N] in x's dtype, xa [M, R] in lora_A's dtype); tile.block_r covers the whole rank."""
    (m, k), n, r = x.shape, weight.shape[0], lora_A.shape[0]
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    xa = torch.empty((m, r), dtype=lora_A.dtype, device=x.device)
    grid = (triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),)
    launch(
        one_pass_kernel, grid,
        x, weight, lora_A, lora_B, bias, seed, y, xa,
        m, n, k, r, scale, threshold,
        *x.stride(), *weight.stride(), *lora_A.stride(), *lora_B.stride(),
        HAS_BIAS=bias is not None, HAS_DROPOUT=seed is not None, PRECISION=precision,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BLOCK_R=tile.block_r, GROUP_M=tile.group_m,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return y, xa
