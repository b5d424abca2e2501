"""The `torch` backend of the LoRA linear: library GEMMs in their accumulating forms, on any device torch has.

    xa = alpha (mask * x) A^T      y = (b + xa B^T), then y += x W^T in the GEMM
    dyb = alpha dy B               dx = mask * (dyb A), then dx += dy W in the GEMM

with alpha = scaling / (1 - p). The expand goes first and the base GEMM accumulates on top: y is read and written once
less than in the eager chain, and is rounded after its large term rather than before.

Three cases leave the plain form. With dropout, with fp32 adapters over 16-bit x, and where the plan says "upcast" (a
CPU without 16-bit matrix instructions), the rank-sized products run over blocks of rows that are converted to fp32
while they are in cache; nothing of x's or y's size is ever made in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.planning import Plan
from lora_kernels.reference.philox import COLUMNS_PER_COUNTER, dropout_scale, keep_mask

# Elements of one fp32 block: on a CPU it stays in a core's L2 (2 MiB here; keep_mask is fastest at 2^17 elements: 17 ms
# for 1024 x 2048 against 34 ms in one piece), on a GPU it must be large enough to fill the machine.
BLOCK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 25}
# fp32 copy of the weight's rows that "upcast" holds at a time: 32 MiB.
WEIGHT_BLOCK_ELEMENTS = 1 << 23
UPCAST_ROWS = 512


class Needs(NamedTuple):
    """Which gradients the caller asked for, in the order of the operation's arguments."""

    x: bool
    weight: bool
    lora_A: bool
    lora_B: bool
    bias: bool


def _row_blocks(t: Tensor) -> Iterator[slice]:
    rows, columns = t.shape
    step = max(16, BLOCK_ELEMENTS.get(t.device.type, BLOCK_ELEMENTS["cuda"]) // columns)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _scaled_mm(a: Tensor, b: Tensor, alpha: float, out: Tensor) -> None:
    """out = alpha * a @ b, scaled in the GEMM's accumulator; beta = 0 ignores what out held."""
    torch.addmm(out, a, b, beta=0, alpha=alpha, out=out)


def _compute_dtype(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


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
    m, n, r = x.shape[0], weight.shape[0], lora_A.shape[0]
    alpha = scaling if seed is None else scaling * dropout_scale(dropout_p)
    blockwise = seed is not None or lora_A.dtype != x.dtype or plan.strategy == "upcast"
    xa = torch.empty((m, r), dtype=lora_A.dtype, device=x.device)
    if blockwise:
        wide_A = lora_A.to(_compute_dtype(x))
        for rows in _row_blocks(x):
            block = _dropped(x, rows, seed, dropout_p)
            xa[rows] = torch.mm(block, wide_A.T).mul_(alpha)
    else:
        _scaled_mm(x, lora_A.T, alpha, xa)

    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if plan.strategy == "upcast":
        _upcast_gemm(x, weight.T, xa, lora_B.T, bias, None, 0.0, y)
        return y, xa
    if xa.dtype != x.dtype:
        wide_bias = None if bias is None else bias.to(xa.dtype)
        for rows in _row_blocks(y):
            block = torch.mm(xa[rows], lora_B.T) if wide_bias is None else torch.addmm(wide_bias, xa[rows], lora_B.T)
            y[rows] = block
    elif bias is None:
        torch.mm(xa, lora_B.T, out=y)
    else:
        torch.addmm(bias, xa, lora_B.T, out=y)
    return y.addmm_(x, weight.T), xa


def _dropped(x: Tensor, rows: slice, seed: Tensor | None, dropout_p: float) -> Tensor:
    """mask * x for a block of rows, in at least fp32; the 1 / (1 - p) is in alpha."""
    if seed is None:
        return x[rows].to(_compute_dtype(x))
    return _mask(x[rows].to(_compute_dtype(x), copy=True), seed, dropout_p, rows.start)


def _mask(block: Tensor, seed: Tensor, dropout_p: float, first_row: int, first_column: int = 0) -> Tensor:
    """Zeroes the dropped elements of a block in place; a fill, since a product would keep their NaN and Inf."""
    rows, columns = block.shape
    keep = keep_mask(seed, rows, columns, dropout_p, first_row=first_row, first_column=first_column)
    return block.masked_fill_(keep.logical_not_(), 0)


def _upcast_gemm(
    lhs: Tensor,
    rhs: Tensor,
    s: Tensor,
    e: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    out: Tensor,
) -> None:
    """out = lhs rhs + bias + mask * (s e), in fp32 over blocks of out, each rounded once."""
    (m, k), n = lhs.shape, rhs.shape[1]
    s, e = s.float(), e.float()
    step_n = max(256, WEIGHT_BLOCK_ELEMENTS // k // COLUMNS_PER_COUNTER * COLUMNS_PER_COUNTER)
    for start_n in range(0, n, step_n):
        columns = slice(start_n, start_n + step_n)
        wide_rhs, wide_e = rhs[:, columns].float(), e[:, columns]
        wide_bias = None if bias is None else bias[columns].float()
        for start_m in range(0, m, UPCAST_ROWS):
            rows = slice(start_m, min(start_m + UPCAST_ROWS, m))
            block = torch.mm(s[rows], wide_e) if wide_bias is None else torch.addmm(wide_bias, s[rows], wide_e)
            if seed is not None:
                _mask(block, seed, dropout_p, rows.start, start_n)
            out[rows, columns] = block.addmm_(lhs[rows].float(), wide_rhs)


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    xa: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    needs: Needs,
    plan: Plan,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, lora_A, lora_B, bias; None where not needed. What a needed one reads is there."""
    alpha = scaling if seed is None else scaling * dropout_scale(dropout_p)
    d_lora_B = dyb = d_lora_A = dx = d_weight = d_bias = None
    adapter = next((t for t in (lora_A, lora_B, xa) if t is not None), None)
    mixed = adapter is not None and adapter.dtype != dy.dtype
    upcast = plan.strategy == "upcast"
    needs_dyb = needs.x or needs.lora_A
    if mixed or upcast:
        dyb, d_lora_B = _blockwise_lora_b(dy, lora_B if needs_dyb else None, xa if needs.lora_B else None, alpha)
    else:
        if needs.lora_B:
            assert xa is not None
            d_lora_B = torch.mm(dy.T, xa)
        if needs_dyb:
            assert lora_B is not None
            dyb = torch.empty((dy.shape[0], lora_B.shape[1]), dtype=lora_B.dtype, device=dy.device)
            _scaled_mm(dy, lora_B, alpha, dyb)
    if needs.lora_A:
        assert x is not None and dyb is not None
        blockwise = mixed or upcast or seed is not None
        d_lora_A = _blockwise_lora_a(x, dyb, seed, dropout_p) if blockwise else torch.mm(dyb.T, x)
    if needs.x:
        assert weight is not None and lora_A is not None and dyb is not None
        dx = torch.empty((dy.shape[0], weight.shape[1]), dtype=dy.dtype, device=dy.device)
        if upcast:
            _upcast_gemm(dy, weight, dyb, lora_A, None, seed, dropout_p, dx)
        else:
            _low_rank_dx(dyb, lora_A, seed, dropout_p, dx)
            dx.addmm_(dy, weight)
    if needs.weight:
        assert x is not None
        d_weight = torch.mm(dy.T, x)
    if needs.bias:
        d_bias = dy.sum(0)
    return dx, d_weight, d_lora_A, d_lora_B, d_bias


def _blockwise_lora_b(
    dy: Tensor, lora_B: Tensor | None, xa: Tensor | None, alpha: float
) -> tuple[Tensor | None, Tensor | None]:
    """(dyb, dB) from one pass over blocks of dy; each None where its operand is."""
    m, n = dy.shape
    compute = _compute_dtype(dy)
    dyb = d_lora_B = wide_B = None
    if lora_B is not None:
        dyb = torch.empty((m, lora_B.shape[1]), dtype=lora_B.dtype, device=dy.device)
        wide_B = lora_B.to(compute)
    if xa is not None:
        d_lora_B = torch.zeros((n, xa.shape[1]), dtype=compute, device=dy.device)
    for rows in _row_blocks(dy):
        block = dy[rows].to(compute)
        if dyb is not None and wide_B is not None:
            dyb[rows] = torch.mm(block, wide_B).mul_(alpha)
        if d_lora_B is not None and xa is not None:
            d_lora_B.addmm_(block.T, xa[rows].to(compute))
    if d_lora_B is not None and xa is not None:
        d_lora_B = d_lora_B.to(xa.dtype)
    return dyb, d_lora_B


def _blockwise_lora_a(x: Tensor, dyb: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    """dA = dyb^T (mask * x), accumulated in fp32 over blocks of rows and cast once."""
    compute = _compute_dtype(x)
    d_lora_A = torch.zeros((dyb.shape[1], x.shape[1]), dtype=compute, device=x.device)
    for rows in _row_blocks(x):
        d_lora_A.addmm_(dyb[rows].to(compute).T, _dropped(x, rows, seed, dropout_p))
    return d_lora_A.to(dyb.dtype)


def _low_rank_dx(dyb: Tensor, lora_A: Tensor, seed: Tensor | None, dropout_p: float, dx: Tensor) -> None:
    """Writes mask * (dyb A) into dx, block by block where it must be masked or converted."""
    if seed is None and dyb.dtype == dx.dtype:
        torch.mm(dyb, lora_A, out=dx)
        return
    for rows in _row_blocks(dx):
        block = torch.mm(dyb[rows], lora_A)
        if seed is not None:
            _mask(block, seed, dropout_p, rows.start)
        dx[rows] = block
