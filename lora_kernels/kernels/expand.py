"""Expand: the product from the rank to a large tensor, onto one that is there or by itself.

    out = base + bias + gain s e        or        out = gain s e

Grid (tiles of out, along its rows first, so that programs side by side read and write the same rows). base is read
once and out written once, which is what this kernel takes; s and e come from the cache. Called for
y = base_out + xa B^T in the forward of a branch, and for dx = dyb A in its backward without dropout. Scaling is already
inside s, but for gain, as in `gemm_expand`. out may be base itself: each program reads and writes the same elements.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels.device import expand_into
from lora_kernels.kernels.launch import ceil_div, launch
from lora_kernels.planning.tiles import Tile


@triton.jit(do_not_specialize=["M"])  # one binary for every number of tokens
def expand_kernel(
    base_ptr, s_ptr, e_ptr, bias_ptr, out_ptr,
    M, N, R, gain,
    stride_base_m, stride_base_n, stride_s_m, stride_e_r, stride_e_n,
    HAS_BASE: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    num_n = tl.cdiv(N, BLOCK_N)
    pid_m, pid_n = tl.program_id(0) // num_n, tl.program_id(0) % num_n
    # s and e are fp32 beside a 16-bit out; 16-bit ones beside an fp32 out are multiplied as they are.
    WIDE: tl.constexpr = (s_ptr.dtype.element_ty == tl.float32) and (out_ptr.dtype.element_ty != tl.float32)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, columns = offs_m.to(tl.int64)[:, None], offs_n.to(tl.int64)[None, :]
    mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    if HAS_BASE:
        base = tl.load(base_ptr + rows * stride_base_m + columns * stride_base_n, mask=mask, other=0.0)
        acc = base.to(tl.float32)  # [BLOCK_M, BLOCK_N]
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    acc = expand_into(
        acc, s_ptr, e_ptr, 0, 0, gain,
        M, N, R, offs_m, offs_n, pid_n * BLOCK_N,
        stride_s_m, stride_e_r, stride_e_n,
        False, WIDE, PRECISION, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    tl.store(out_ptr + rows * N + columns, acc.to(out_ptr.dtype.element_ty), mask=mask)


def expand(
    *,
    base: Tensor | None,
    s: Tensor,
    e: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype,
    gain: float = 1.0,
    precision: str,
    tile: Tile,
) -> Tensor:
    """base [M, N] + bias [N] + gain s [M, R] @ e [R, N], contiguous in out_dtype; no base: the product alone.

    s has unit stride along R, bias unit stride; out, contiguous and of out_dtype, is written instead of a new tensor.
    """
    (m, r), n = s.shape, e.shape[1]
    if out is None:
        out = torch.empty((m, n), dtype=out_dtype, device=s.device)
    grid = (ceil_div(m, tile.block_m) * ceil_div(n, tile.block_n),)
    launch(
        expand_kernel, grid,
        base, s, e, bias, out,
        m, n, r, gain,
        *(out if base is None else base).stride(), s.stride(0), *e.stride(),
        HAS_BASE=base is not None, HAS_BIAS=bias is not None, PRECISION=precision,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_R=tile.block_r,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out
