"""fp32 operands of an expand as bf16 ones of three times the rank, for a product that knows one dtype.

    s e = [s1 | s2 | s1] [e1 | e1 | e2]^T, but for s2 e2        s1 = bf16(s), s2 = bf16(s - s1)

The three products of `device.expand_dot`, off by at most 3 x 2^-16 of the term, side by side: more steps of the
persistent kernel's main loop. Grid (blocks of elements, s and e).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels.device import finite_part
from lora_kernels.kernels.launch import ceil_div, launch

BLOCK = 1024
PARTS = 3


@triton.jit
def _write_parts(
    t_ptr, parts_ptr, elements, columns, stride_row, stride_column, stride_parts_row, stride_part,
    OF_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < elements
    row, column = offs // columns, offs % columns
    t = tl.load(t_ptr + row * stride_row + column * stride_column, mask=mask, other=0.0)
    first = t.to(tl.bfloat16)
    finite = finite_part(first)  # an Inf meets no part but the first of the other operand: Inf * 0 is NaN
    second = (finite_part(t) - finite).to(tl.bfloat16)
    out = parts_ptr + row * stride_parts_row + column
    tl.store(out, first, mask=mask)
    tl.store(out + stride_part, second if OF_S else finite.to(tl.bfloat16), mask=mask)
    tl.store(out + 2 * stride_part, finite.to(tl.bfloat16) if OF_S else second, mask=mask)


@triton.jit(do_not_specialize=["s_elements"])  # one binary for every number of tokens
def in_parts_kernel(
    s_ptr, s_parts_ptr, e_ptr, e_parts_ptr,
    s_elements, e_elements, R, e_columns,
    stride_e_row, stride_e_column, stride_e_parts_row, stride_e_part,
    BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        _write_parts(s_ptr, s_parts_ptr, s_elements, R, R, 1, 3 * R, R, True, BLOCK)
    else:
        _write_parts(
            e_ptr, e_parts_ptr, e_elements, e_columns, stride_e_row, stride_e_column, stride_e_parts_row, stride_e_part,
            False, BLOCK,
        )  # fmt: skip


def in_parts(*, s: Tensor, e: Tensor, by_columns: bool) -> tuple[Tensor, Tensor]:
    """(s [M, 3 R], e [3 R, N]) in bf16 for fp32 s [M, R], contiguous, and e [R, N].

    by_columns: e is laid out as [N, 3 R], transposed, as a weight [N, K] is beside it; else row by row.
    """
    (m, r), n = s.shape, e.shape[1]
    s_parts = torch.empty((m, PARTS * r), dtype=torch.bfloat16, device=s.device)
    source = e.T if by_columns else e
    e_parts = torch.empty((n, PARTS * r) if by_columns else (PARTS * r, n), dtype=torch.bfloat16, device=s.device)
    launch(
        in_parts_kernel, (ceil_div(max(m, n) * r, BLOCK), 2),
        s, s_parts, source, e_parts,
        m * r, n * r, r, source.shape[1],
        *source.stride(), e_parts.stride(0), r if by_columns else r * n,
        BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return s_parts, e_parts.T if by_columns else e_parts
