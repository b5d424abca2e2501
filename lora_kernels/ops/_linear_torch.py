"""The `torch` backend of the LoRA linear: library GEMMs in their accumulating forms, on any device torch has.

    xa = alpha (mask * x) A^T      y = (b + xa B^T), then y += x W^T in the GEMM
    dyb = alpha dy B               dx = mask * (dyb A), then dx += dy W in the GEMM

with alpha = scaling / (1 - p). The expand goes first and the base GEMM accumulates on top: y is read and written once
less than in the eager chain, and is rounded after its large term rather than before. Between equal orders of a product
the one with the long result rows is taken: dy^T xa takes MKL 1.3 times as long as xa^T dy (`bench.choices`).

Three cases leave the plain form. With dropout, with fp32 adapters over 16-bit x, and where the plan says "upcast" (a
CPU without 16-bit matrix instructions), the rank-sized products run over blocks of rows that are converted to fp32
while they are in cache; nothing of x's or y's size is ever made in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_kernels.ops._needs import Needs
from lora_kernels.planning import Plan
from lora_kernels.reference.philox import dropout_scale

if TYPE_CHECKING:
    from lora_kernels.ops._dropout import Dropper

# Elements of one fp32 block, 4 MiB on a CPU: so large that a call is a few large GEMMs. Blocks of 2^17, which stay in
# L2, make each step 64 rows, and each small GEMM is a barrier between threads.
BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 22}
# fp32 copy of the weight that "upcast" holds at a time: 32 MiB.
WEIGHT_BLOCK_ELEMENTS = 1 << 23


def _row_blocks(t: Tensor, columns: int = 0) -> Iterator[slice]:
    rows, columns = t.shape[0], max(t.shape[1], columns)
    step = max(16, BLOCK_ELEMENTS.get(t.device.type, BLOCK_ELEMENTS["cuda"]) // columns)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _scaled_mm(a: Tensor, b: Tensor, alpha: float, out: Tensor) -> None:
    """out = alpha * a @ b, scaled before it is rounded to out's dtype; what out held does not count."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=0, alpha=alpha, out=out)
    else:
        out.copy_(torch.mm(a, b).mul_(alpha))


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
    xa = torch.empty((m, r), dtype=lora_A.dtype, device=x.device)
    if seed is not None or lora_A.dtype != x.dtype or plan.strategy == "upcast":
        wide_A = lora_A.to(_compute_dtype(x))
        buffer = _block_buffer(x)
        drop = _dropper(seed, dropout_p, buffer)
        for rows in _row_blocks(x):
            block = _wide(x[rows], buffer)
            if drop is not None:
                dropped = buffer[: block.shape[0]]
                drop([(block, dropped)], first_row=rows.start)
                block = dropped
            _scaled_mm(block, wide_A.T, alpha, xa[rows])
    else:
        _scaled_mm(x, lora_A.T, alpha, xa)

    s, expand, bias = _fold_bias(xa, lora_B, bias)
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if plan.strategy == "upcast":
        _upcast_gemm(x, weight.T, y, s, expand.T)
        return y, xa
    if xa.dtype != x.dtype:
        wide_bias = None if bias is None else bias.to(xa.dtype)
        for rows in _row_blocks(y):
            y[rows] = torch.mm(s[rows], expand.T) if wide_bias is None else torch.addmm(wide_bias, s[rows], expand.T)
    elif bias is None:
        torch.mm(s, expand.T, out=y)
    else:
        torch.addmm(bias, s, expand.T, out=y)
    return y.addmm_(x, weight.T), xa


def _fold_bias(xa: Tensor, lora_B: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """([xa | 1], [lora_B | bias], None) on a CPU: the bias as one more rank. On a GPU, whose GEMMs add it, unchanged.

    A CPU's addmm copies the bias into every row of y first: twice as long (`bench.choices`).
    """
    if bias is None or xa.device.type != "cpu":
        return xa, lora_B, bias
    folded = torch.cat([xa, xa.new_ones((xa.shape[0], 1))], 1)
    return folded, torch.cat([lora_B, bias.to(lora_B.dtype)[:, None]], 1), None


def _block_buffer(t: Tensor, columns: int = 0) -> Tensor:
    """One buffer for all of `_row_blocks(t, columns)` in fp32: new ones would fault their pages in, block by block."""
    rows = next(iter(_row_blocks(t, columns)), slice(0, 0)).stop
    return torch.empty((rows, columns or t.shape[1]), dtype=_compute_dtype(t), device=t.device)


def _wide(block: Tensor, buffer: Tensor) -> Tensor:
    """The block in the buffer's dtype: as it is where it has that, else copied into the buffer."""
    return block if block.dtype == buffer.dtype else buffer[: block.shape[0]].copy_(block)


def _dropper(seed: Tensor | None, dropout_p: float, buffer: Tensor) -> Dropper | None:
    """Drops from blocks as large as the buffer; None without dropout."""
    if seed is None:
        return None
    # NumPy comes with the first mask: importing the package needs torch alone.
    from lora_kernels.ops._dropout import Dropper

    return Dropper(seed, dropout_p, rows=buffer.shape[0], columns=buffer.shape[1], dtype=buffer.dtype)


def _upcast_gemm(lhs: Tensor, rhs: Tensor, out: Tensor, s: Tensor | None = None, e: Tensor | None = None) -> None:
    """out = lhs rhs + s e in fp32 over blocks of out, each rounded once; without s and e, out += lhs rhs."""
    k, n = rhs.shape
    wide_s, wide_e = (None, None) if s is None or e is None else (s.float(), e.float())
    step_n = min(n, max(256, WEIGHT_BLOCK_ELEMENTS // k))
    lhs_buffer, out_buffer = _block_buffer(lhs), _block_buffer(lhs, step_n)
    for start_n in range(0, n, step_n):
        columns = slice(start_n, min(start_n + step_n, n))
        wide_rhs = rhs[:, columns].float()
        for rows in _row_blocks(lhs, step_n):
            block = out_buffer[: rows.stop - rows.start, : columns.stop - columns.start]
            if wide_s is None or wide_e is None:
                block.copy_(out[rows, columns])
            else:
                torch.mm(wide_s[rows], wide_e[:, columns], out=block)
            out[rows, columns] = block.addmm_(_wide(lhs[rows], lhs_buffer), wide_rhs)


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
    alpha = scaling if seed is None else scaling * dropout_scale(dropout_p)
    xa = xa if needs.lora_B else None
    lora_x = x if needs.lora_A else None
    dx = None
    if needs.x:
        assert weight is not None
        dx = torch.empty((dy.shape[0], weight.shape[1]), dtype=dy.dtype, device=dy.device)
    upcast = plan.backward_way.strategy == "upcast"
    wide = upcast or lora_A.dtype != dy.dtype
    of_dy = _blockwise_lora_b if wide else _lora_b
    dyb, d_lora_B, d_bias = of_dy(dy, lora_B if needs.x or needs.lora_A else None, xa, needs.bias, alpha)
    if wide or seed is not None:
        d_lora_A = _blockwise_lora_a(lora_x, dyb, lora_A, seed, dropout_p, dx)
    else:
        d_lora_A = None if lora_x is None or dyb is None else torch.mm(dyb.T, lora_x)
        if dx is not None and dyb is not None:
            torch.mm(dyb, lora_A, out=dx)
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
    if d_bias is not None:
        d_bias = d_bias.to(torch.promote_types(dy.dtype, lora_A.dtype))
    return dx, d_weight, d_lora_A, d_lora_B, d_bias


def _lora_b(
    dy: Tensor, lora_B: Tensor | None, xa: Tensor | None, needs_bias: bool, alpha: float
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dyb, dB, db) of one dtype; the first two None where their operand is."""
    dyb = None
    if lora_B is not None:
        dyb = torch.empty((dy.shape[0], lora_B.shape[1]), dtype=lora_B.dtype, device=dy.device)
        _scaled_mm(dy, lora_B, alpha, dyb)
    d_lora_B = None if xa is None else torch.mm(xa.T, dy).T.contiguous()
    return dyb, d_lora_B, dy.sum(0) if needs_bias else None


def _blockwise_lora_b(
    dy: Tensor, lora_B: Tensor | None, xa: Tensor | None, needs_bias: bool, alpha: float
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dyb, dB, db) from one pass over blocks of dy, in fp32; the first two None where their operand is."""
    compute = _compute_dtype(dy)
    dyb = d_lora_B = wide_B = None
    d_bias = torch.zeros(dy.shape[1], dtype=compute, device=dy.device) if needs_bias else None
    if lora_B is not None:
        dyb = torch.empty((dy.shape[0], lora_B.shape[1]), dtype=lora_B.dtype, device=dy.device)
        wide_B = lora_B.to(compute)
    if xa is not None:
        d_lora_B = torch.zeros((xa.shape[1], dy.shape[1]), dtype=compute, device=dy.device)
    buffer = _block_buffer(dy)
    for rows in _row_blocks(dy):
        block = _wide(dy[rows], buffer)
        if dyb is not None and wide_B is not None:
            _scaled_mm(block, wide_B, alpha, dyb[rows])
        if d_lora_B is not None and xa is not None:
            d_lora_B.addmm_(xa[rows].to(compute).T, block)
        if d_bias is not None:
            d_bias += block.sum(0)
    d_lora_B = None if d_lora_B is None or xa is None else d_lora_B.T.to(xa.dtype).contiguous()
    return dyb, d_lora_B, d_bias


def _blockwise_lora_a(
    x: Tensor | None,
    dyb: Tensor | None,
    lora_A: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    dx: Tensor | None,
) -> Tensor | None:
    """Returns dA = dyb^T (mask * x) and writes mask * (dyb A) into dx, with one evaluation of the mask for both.

    In fp32 over blocks of rows; dA is cast once. None for x or dx leaves that product out.
    """
    shaped = x if dx is None else dx
    if shaped is None or dyb is None:
        return None
    compute = _compute_dtype(dyb)
    wide_A = lora_A.to(compute)
    d_lora_A = None if x is None else torch.zeros(lora_A.shape, dtype=compute, device=x.device)
    x_buffer, dx_buffer = _block_buffer(shaped), None
    if dx is not None and dx.dtype != compute:
        dx_buffer = torch.empty_like(x_buffer)
    drop = _dropper(seed, dropout_p, x_buffer)
    for rows in _row_blocks(shaped):
        count = rows.stop - rows.start
        block_dyb = dyb[rows].to(compute)
        block_x = block_dx = None
        masked = []
        if x is not None:
            block_x = _wide(x[rows], x_buffer)
            if drop is not None:
                masked.append((block_x, x_buffer[:count]))
                block_x = x_buffer[:count]
        if dx is not None:
            block_dx = dx[rows] if dx_buffer is None else dx_buffer[:count]
            torch.mm(block_dyb, wide_A, out=block_dx)
            masked.append((block_dx, block_dx))
        if drop is not None:
            drop(masked, first_row=rows.start)
        if block_x is not None and d_lora_A is not None:
            d_lora_A.addmm_(block_dyb.T, block_x)
        if dx is not None and dx_buffer is not None and block_dx is not None:
            dx[rows] = block_dx
    return None if d_lora_A is None else d_lora_A.to(lora_A.dtype)
