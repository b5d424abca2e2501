"""Base and low-rank product in one pass: the forward that reads x and W once.

    y = x W^T + b + gain xa B^T        xa = scale * (mask * x) A^T

Grid (tiles of y, splits of K), tiles grouped for L2. Each program accumulates its rows of x A^T beside its tile of
x W^T in the same main loop. The low-rank product is repeated by every column of tiles, so this is the plan where the
weight's bytes are the cost (decode).

With one split that is the only launch: the epilogue expands, and the first column of tiles stores xa for the backward.
A small weight has too few columns of tiles to keep a GPU's memory busy; with several splits each program stores fp32
shares of its products, of x A^T from the first column of tiles only, and a second launch with grid (row tiles, column
tiles) adds them in fixed order, then expands: no atomics, the same bits each time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels.device import (
    expand_dot,
    grouped_tile,
    kahan_add,
    keep_tile,
    load_seed,
    low_rank_dot,
    masked_dot,
    with_gain,
    without_gain,
)
from lora_kernels.kernels.launch import ceil_div, has_offset, launch, split_in_blocks
from lora_kernels.planning.tiles import Tile


@triton.jit
def expand_and_store(
    acc, acc_xa, b_ptr, bias_ptr, y_ptr, xa_ptr,
    M, N, R, scale, gain, stores_xa, offs_m, offs_n, offs_r, stride_b_n, stride_b_r,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y from acc [BLOCK_M, BLOCK_N] and xa from acc_xa [BLOCK_M, BLOCK_R], whose columns past R are zero."""
    rows, columns = offs_m.to(tl.int64), offs_n.to(tl.int64)
    # Scaled in fp32, rounded once: what the backward will read is what is expanded here.
    xa = (acc_xa * tl.cast(scale, tl.float32)).to(xa_ptr.dtype.element_ty)
    if stores_xa:
        xa_ptrs = xa_ptr + rows[:, None] * R + offs_r[None, :]
        tl.store(xa_ptrs, xa, mask=(offs_m[:, None] < M) & (offs_r[None, :] < R))
    # [BLOCK_R, BLOCK_N]
    b = tl.load(
        b_ptr + columns[None, :] * stride_b_n + offs_r.to(tl.int64)[:, None] * stride_b_r,
        mask=(offs_r[:, None] < R) & (offs_n[None, :] < N),
        other=0.0,
    )
    acc = without_gain(acc, gain, xa_ptr.dtype.element_ty)
    acc = expand_dot(xa, b, acc, xa_ptr.dtype.element_ty != y_ptr.dtype.element_ty, PRECISION)
    acc = with_gain(acc, gain, xa_ptr.dtype.element_ty)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y_ptr + rows[:, None] * N + offs_n[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=(offs_m[:, None] < M) & (offs_n[None, :] < N),
    )


@triton.jit(do_not_specialize=["M", "threshold"])  # one binary for every number of tokens and every p
def one_pass_kernel(
    x_ptr, w_ptr, a_ptr, b_ptr, bias_ptr, seed_ptr, y_ptr, xa_ptr,
    M, N, K, R, k_per_split, scale, gain, threshold,
    stride_x_m, stride_x_k, stride_w_n, stride_w_k, stride_a_r, stride_a_k, stride_b_n, stride_b_r,
    IS_PARTIAL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_OFFSET: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)
    pid_split = tl.program_id(1)
    k_begin = pid_split * k_per_split
    rows, columns, first_k = offs_m.to(tl.int64), offs_n.to(tl.int64), (k_begin + offs_k).to(tl.int64)
    x_ptrs = x_ptr + rows[:, None] * stride_x_m + first_k[None, :] * stride_x_k
    w_ptrs = w_ptr + first_k[:, None] * stride_w_k + columns[None, :] * stride_w_n
    a_ptrs = a_ptr + first_k[:, None] * stride_a_k + offs_r.to(tl.int64)[None, :] * stride_a_r
    seed = load_seed(seed_ptr, HAS_OFFSET) if HAS_DROPOUT else 0

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_xa = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(k_begin, tl.minimum(k_begin + k_per_split, K), BLOCK_K):
        # A split is a whole number of blocks, so that only K itself cuts one; K's divisibility keeps loads wide.
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs, mask=(offs_m[:, None] < M) & mask_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        w = tl.load(w_ptrs, mask=mask_k[:, None] & (offs_n[None, :] < N), other=0.0)  # [BLOCK_K, BLOCK_N]
        a = tl.load(a_ptrs, mask=mask_k[:, None] & (offs_r[None, :] < R), other=0.0)  # [BLOCK_K, BLOCK_R]
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        if HAS_DROPOUT:
            x = tl.where(keep_tile(seed, offs_m, k, threshold, BLOCK_K), x, 0.0)
            acc_xa = masked_dot(x, a, acc_xa, PRECISION)
        else:
            acc_xa = low_rank_dot(x, a, acc_xa, PRECISION)
        x_ptrs += tl.cast(stride_x_k, tl.int64) * BLOCK_K
        w_ptrs += tl.cast(stride_w_k, tl.int64) * BLOCK_K
        a_ptrs += tl.cast(stride_a_k, tl.int64) * BLOCK_K

    if IS_PARTIAL:
        y_ptr += pid_split.to(tl.int64) * M * N
        xa_ptr += pid_split.to(tl.int64) * M * R
        mask_m = offs_m[:, None] < M
        mask_xa = mask_m & (offs_r[None, :] < R) & (pid_n == 0)
        tl.store(xa_ptr + rows[:, None] * R + offs_r[None, :], acc_xa, mask=mask_xa)
        tl.store(y_ptr + rows[:, None] * N + offs_n[None, :], acc, mask=mask_m & (offs_n[None, :] < N))
    else:
        # The padded columns are Inf * 0 where x is Inf, and must not meet the padded rows of B.
        acc_xa = tl.where(offs_r[None, :] < R, acc_xa, 0.0)
        expand_and_store(
            acc, acc_xa, b_ptr, bias_ptr, y_ptr, xa_ptr,
            M, N, R, scale, gain, pid_n == 0, offs_m, offs_n, offs_r, stride_b_n, stride_b_r,
            HAS_BIAS, PRECISION,
        )  # fmt: skip


@triton.jit
def sum_shares(shares_ptr, stride_split, splits, offs, mask, UNROLL: tl.constexpr):
    """The fp32 sum over splits of the tile at offs, zero where masked; compensated as in `reduce_partials`."""
    acc = tl.zeros(offs.shape, tl.float32)
    lost = tl.zeros(offs.shape, tl.float32)
    ptrs = shares_ptr + offs
    # Unrolled so that several loads are in flight: few programs run, and each would wait once for each split.
    for _ in tl.range(0, splits, loop_unroll_factor=UNROLL):
        acc, lost = kahan_add(acc, lost, tl.load(ptrs, mask=mask, other=0.0))
        ptrs += stride_split
    return acc


@triton.jit(do_not_specialize=["M", "splits"])
def one_pass_sum_kernel(
    y_shares_ptr, xa_shares_ptr, b_ptr, bias_ptr, y_ptr, xa_ptr,
    M, N, R, splits, scale, gain,
    stride_b_n, stride_b_r,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = tl.program_id(0), tl.program_id(1)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    rows, mask_m = offs_m.to(tl.int64)[:, None], offs_m[:, None] < M
    many = tl.cast(M, tl.int64)
    mask_y, mask_xa = mask_m & (offs_n[None, :] < N), mask_m & (offs_r[None, :] < R)
    acc = sum_shares(y_shares_ptr, many * N, splits, rows * N + offs_n[None, :], mask_y, 4)
    # At the widest rank four loads in flight spill.
    acc_xa = sum_shares(xa_shares_ptr, many * R, splits, rows * R + offs_r[None, :], mask_xa, 4 if BLOCK_R < 128 else 2)
    expand_and_store(
        acc, acc_xa, b_ptr, bias_ptr, y_ptr, xa_ptr,
        M, N, R, scale, gain, pid_n == 0, offs_m, offs_n, offs_r, stride_b_n, stride_b_r,
        HAS_BIAS, PRECISION,
    )  # fmt: skip


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
    gain: float = 1.0,
    splits: int,
    precision: str,
    tile: Tile,
    sum_tile: Tile,
) -> tuple[Tensor, Tensor]:
    """(y [M, N] in x's dtype, xa [M, R] in lora_A's dtype); block_r of both tiles covers the whole rank."""
    (m, k), n, r = x.shape, weight.shape[0], lora_A.shape[0]
    k_per_split, splits = split_in_blocks(k, splits, tile.block_k)
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    xa = torch.empty((m, r), dtype=lora_A.dtype, device=x.device)
    y_target, xa_target = y, xa
    if splits > 1:
        y_target, xa_target = (
            torch.empty((splits, m, width), dtype=torch.float32, device=x.device) for width in (n, r)
        )
    grid = (ceil_div(m, tile.block_m) * ceil_div(n, tile.block_n), splits)
    launch(
        one_pass_kernel, grid,
        x, weight, lora_A, lora_B, bias, seed, y_target, xa_target,
        m, n, k, r, k_per_split, scale, gain, threshold,
        *x.stride(), *weight.stride(), *lora_A.stride(), *lora_B.stride(),
        IS_PARTIAL=splits > 1, HAS_BIAS=bias is not None, HAS_DROPOUT=seed is not None,
        HAS_OFFSET=has_offset(seed), PRECISION=precision,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BLOCK_R=tile.block_r, GROUP_M=tile.group_m,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if splits > 1:
        launch(
            one_pass_sum_kernel, (ceil_div(m, sum_tile.block_m), ceil_div(n, sum_tile.block_n)),
            y_target, xa_target, lora_B, bias, y, xa,
            m, n, r, splits, scale, gain,
            *lora_B.stride(),
            HAS_BIAS=bias is not None, PRECISION=precision,
            BLOCK_M=sum_tile.block_m, BLOCK_N=sum_tile.block_n, BLOCK_R=sum_tile.block_r,
            num_warps=sum_tile.num_warps, num_stages=sum_tile.num_stages,
        )  # fmt: skip
    return y, xa
