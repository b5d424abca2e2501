"""The adapter half of the `torch` backends: xa, dyb, dB, d_bias, and dA with the low-rank part of dx.

    xa = alpha (mask * x) A^T      dyb = alpha dy B      dB = dy^T xa
    dA = dyb^T (mask * x)          dx0 = mask * (dyb A)

with alpha = scaling / (1 - p). Of alpha an fp16 xa or dyb holds `Scale.inside` (`_scale`), and what is made of them
multiplies by `Scale.gain`. Operands of one dtype without a mask are one library call each. With dropout, where
dtypes differ, and where a plan says "upcast" (a CPU without 16-bit matrix instructions), the products run over blocks
of rows that are converted to fp32 while they are in cache: nothing of x's or dy's size is ever made in fp32. Between
equal orders of a product the one with the long result rows is taken: dy^T xa takes MKL 1.4 times as long as xa^T dy
(`bench.choices`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lora_kernels.ops._scale import Scale, scale_of

if TYPE_CHECKING:
    from lora_kernels.ops._dropout import Dropper

# Elements of one fp32 block, 4 MiB on a CPU: so large that a call is a few large GEMMs. Blocks of 2^17, which stay in
# L2, make each step 64 rows, and each small GEMM is a barrier between threads.
BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 21}


def row_blocks(t: Tensor, columns: int = 0) -> Iterator[slice]:
    """The rows of t in blocks whose fp32 copies, or those of `columns` columns, stay small."""
    rows, columns = t.shape[0], max(t.shape[1], columns)
    step = max(16, BLOCK_ELEMENTS.get(t.device.type, BLOCK_ELEMENTS["cuda"]) // columns)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def scaled_mm(a: Tensor, b: Tensor, alpha: float, out: Tensor) -> None:
    """out = alpha * a @ b, scaled before it is rounded to out's dtype; what out held does not count."""
    if out.dtype == a.dtype and alpha == 1.0:
        torch.mm(a, b, out=out)
    elif out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=0, alpha=alpha, out=out)
    else:
        out.copy_(torch.mm(a, b).mul_(alpha))


def product(a: Tensor, b: Tensor, gain: float) -> Tensor:
    """gain * a @ b, multiplied before it is rounded."""
    if gain == 1.0:
        return torch.mm(a, b)
    out = torch.empty((a.shape[0], b.shape[1]), dtype=a.dtype, device=a.device)
    scaled_mm(a, b, gain, out)
    return out


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """fp32, or fp64 where a tensor has that."""
    wide = torch.float32
    for t in tensors:
        wide = torch.promote_types(wide, t.dtype)
    return wide


def block_buffer(t: Tensor, columns: int = 0, *, dtype: torch.dtype | None = None) -> Tensor:
    """One buffer for all of `row_blocks(t, columns)` in fp32: new ones would fault their pages in, block by block."""
    rows = next(iter(row_blocks(t, columns)), slice(0, 0)).stop
    return torch.empty((rows, columns or t.shape[1]), dtype=dtype or compute_dtype(t), device=t.device)


def wide(block: Tensor, buffer: Tensor) -> Tensor:
    """The block in the buffer's dtype: as it is where it has that, else copied into the buffer."""
    return block if block.dtype == buffer.dtype else buffer[: block.shape[0]].copy_(block)


def dropper(seed: Tensor | None, dropout_p: float, buffer: Tensor) -> Dropper | None:
    """Drops from blocks as large as the buffer; None without dropout."""
    if seed is None:
        return None
    # NumPy comes with the first mask: importing the package needs torch alone.
    from lora_kernels.ops._dropout import Dropper

    return Dropper(seed, dropout_p, rows=buffer.shape[0], columns=buffer.shape[1], dtype=buffer.dtype)


def shrink(
    x: Tensor, lora_A: Tensor, seed: Tensor | None, dropout_p: float, inside: float, *, upcast: bool = False
) -> Tensor:
    """xa = inside (mask * x) A^T [M, R] in lora_A's dtype."""
    xa = torch.empty((x.shape[0], lora_A.shape[0]), dtype=lora_A.dtype, device=x.device)
    if seed is None and lora_A.dtype == x.dtype and not upcast:
        scaled_mm(x, lora_A.T, inside, xa)
        return xa
    wide_A = lora_A.to(compute_dtype(x))
    buffer = block_buffer(x)
    drop = dropper(seed, dropout_p, buffer)
    for rows in row_blocks(x):
        block = wide(x[rows], buffer)
        if drop is not None:
            dropped = buffer[: block.shape[0]]
            drop([(block, dropped)], first_row=rows.start)
            block = dropped
        scaled_mm(block, wide_A.T, inside, xa[rows])
    return xa


class FromDy(NamedTuple):
    """What backward makes of dy alone and the rank-sized tensors: each None where it was not asked for."""

    dyb: Tensor | None
    d_lora_B: Tensor | None
    d_bias: Tensor | None


def from_dy(
    dy: Tensor,
    lora_B: Tensor | None,
    xa: Tensor | None,
    scale: Scale,
    *,
    bias_dtype: torch.dtype | None = None,
    upcast: bool = False,
) -> FromDy:
    """dyb [M, R] and d_lora_B [N, R] in the adapters' dtype, d_bias [N] in bias_dtype; None for what makes one: not."""
    dtypes = {t.dtype for t in (lora_B, xa) if t is not None} | ({bias_dtype} if bias_dtype else set())
    if not dtypes:
        return FromDy(None, None, None)
    if not upcast and dtypes == {dy.dtype}:
        return _from_dy(dy, lora_B, xa, scale, bias_dtype)
    return _blockwise_from_dy(dy, lora_B, xa, scale, bias_dtype)


def _from_dy(
    dy: Tensor, lora_B: Tensor | None, xa: Tensor | None, scale: Scale, bias_dtype: torch.dtype | None
) -> FromDy:
    """Where all are of one dtype."""
    dyb = None
    if lora_B is not None:
        dyb = torch.empty((dy.shape[0], lora_B.shape[1]), dtype=lora_B.dtype, device=dy.device)
        scaled_mm(dy, lora_B, scale.inside, dyb)
    d_lora_B = None if xa is None else product(xa.T, dy, scale.gain).T.contiguous()
    return FromDy(dyb, d_lora_B, None if bias_dtype is None else dy.sum(0))


def _blockwise_from_dy(
    dy: Tensor, lora_B: Tensor | None, xa: Tensor | None, scale: Scale, bias_dtype: torch.dtype | None
) -> FromDy:
    """One pass over blocks of dy, in fp32."""
    compute = compute_dtype(dy, *(t for t in (lora_B, xa) if t is not None))
    dyb = d_lora_B = wide_B = None
    d_bias = None if bias_dtype is None else torch.zeros(dy.shape[1], dtype=compute, device=dy.device)
    if lora_B is not None:
        dyb = torch.empty((dy.shape[0], lora_B.shape[1]), dtype=lora_B.dtype, device=dy.device)
        wide_B = lora_B.to(compute)
    if xa is not None:
        d_lora_B = torch.zeros((xa.shape[1], dy.shape[1]), dtype=compute, device=dy.device)
    buffer = block_buffer(dy, dtype=compute)
    for rows in row_blocks(dy):
        block = wide(dy[rows], buffer)
        if dyb is not None and wide_B is not None:
            scaled_mm(block, wide_B, scale.inside, dyb[rows])
        if d_lora_B is not None and xa is not None:
            d_lora_B.addmm_(xa[rows].to(compute).T, block)
        if d_bias is not None:
            d_bias += block.sum(0)
    if d_lora_B is not None and xa is not None:
        d_lora_B = d_lora_B.mul_(scale.gain).T.to(xa.dtype).contiguous()
    return FromDy(dyb, d_lora_B, None if d_bias is None else d_bias.to(bias_dtype))


def blockwise_lora_a(
    x: Tensor | None,
    dyb: Tensor | None,
    lora_A: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    gain: float,
    dx: Tensor | None,
) -> Tensor | None:
    """Returns gain dyb^T (mask * x), dA, and writes gain mask * (dyb A) into dx: one evaluation of the mask for both.

    In fp32 over blocks of rows; dA is cast once. None for x or dx leaves that product out.
    """
    shaped = x if dx is None else dx
    if shaped is None or dyb is None:
        return None
    compute = compute_dtype(dyb, shaped)
    wide_A = lora_A.to(compute)
    d_lora_A = None if x is None else torch.zeros(lora_A.shape, dtype=compute, device=x.device)
    x_buffer, dx_buffer = block_buffer(shaped, dtype=compute), None
    if dx is not None and dx.dtype != compute:
        dx_buffer = torch.empty_like(x_buffer)
    drop = dropper(seed, dropout_p, x_buffer)
    for rows in row_blocks(shaped):
        count = rows.stop - rows.start
        block_dyb = dyb[rows].to(compute)
        if gain != 1.0:
            block_dyb = block_dyb * gain
        block_x = block_dx = None
        masked = []
        if x is not None:
            block_x = wide(x[rows], x_buffer)
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


class LowRankGradients(NamedTuple):
    """Of an adapter beside any base: dx without the base's part. Each None where it was not asked for."""

    dx: Tensor | None
    d_lora_A: Tensor | None
    d_lora_B: Tensor | None
    d_bias: Tensor | None


def backward(
    dy: Tensor,
    x: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    xa: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    *,
    needs_x: bool,
    x_dtype: torch.dtype,
    bias_dtype: torch.dtype | None = None,
    upcast: bool = False,
) -> LowRankGradients:
    """x where dA is needed, else None; xa where dB is; bias_dtype where d_bias is."""
    scale = scale_of(seed, scaling, dropout_p, lora_A.dtype)
    needs_dyb = needs_x or x is not None
    dyb, d_lora_B, d_bias = from_dy(dy, lora_B if needs_dyb else None, xa, scale, bias_dtype=bias_dtype, upcast=upcast)
    dx = d_lora_A = None
    if needs_x:
        dx = torch.empty((dy.shape[0], lora_A.shape[1]), dtype=x_dtype, device=dy.device)
    if upcast or lora_A.dtype != x_dtype or seed is not None:
        d_lora_A = blockwise_lora_a(x, dyb, lora_A, seed, dropout_p, scale.gain, dx)
    elif dyb is not None:
        if x is not None:
            d_lora_A = product(dyb.T, x, scale.gain)
        if dx is not None:
            scaled_mm(dyb, lora_A, scale.gain, dx)
    return LowRankGradients(dx, d_lora_A, d_lora_B, d_bias)
