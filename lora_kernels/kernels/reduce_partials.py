"""Fixed-order reduction of partial sums: what makes the split kernels deterministic without atomics.

    out[e] = scale * (((p[0, e] + p[1, e]) + p[2, e]) + ...)

Grid (blocks of elements). fp32 with Kahan's compensation, so that the error does not grow with the number of shares (a
plain chain of 64 would cost more than the library's pairwise sums, and is no faster: the kernel waits for memory); one
rounding to out's dtype.

The chain is over the shares, of which dyb has one for each tile of dy's columns, and a rank-sized result has few
programs: without loads far ahead of their additions, each share would cost the memory's whole latency.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from lora_kernels.kernels.device import kahan_add
from lora_kernels.kernels.launch import ceil_div, launch

BLOCK = 512  # of fp32: one 16-byte load of each thread
STAGES = 8


@triton.jit(do_not_specialize=["splits"])
def reduce_partials_kernel(
    partials_ptr, out_ptr, splits, elements, scale,
    LAUNCHES_DEPENDENTS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    if LAUNCHES_DEPENDENTS:  # as in `shrink`
        gdc_launch_dependents()
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < elements
    acc = tl.zeros((BLOCK,), tl.float32)
    lost = tl.zeros((BLOCK,), tl.float32)
    ptrs = partials_ptr + offs
    for _ in tl.range(0, splits, num_stages=STAGES):
        acc, lost = kahan_add(acc, lost, tl.load(ptrs, mask=mask, other=0.0))
        ptrs += elements
    tl.store(out_ptr + offs, (acc * tl.cast(scale, tl.float32)).to(out_ptr.dtype.element_ty), mask=mask)


def reduce_partials(*, partials: Tensor, scale: float, out: Tensor, launches_dependents: bool = False) -> None:
    """Writes scale * partials.sum(0) into the contiguous tensor `out` of shape partials.shape[1:]."""
    elements = out.numel()
    grid = (ceil_div(elements, BLOCK),)
    launch(
        reduce_partials_kernel, grid,
        partials, out, partials.shape[0], elements, scale,
        LAUNCHES_DEPENDENTS=launches_dependents, BLOCK=BLOCK, STAGES=STAGES, num_warps=4,
    )  # fmt: skip
