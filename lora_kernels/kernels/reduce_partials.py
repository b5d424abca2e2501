"""Fixed-order reduction of partial sums: what makes the split kernels deterministic without atomics.

    out[e] = scale * (((p[0, e] + p[1, e]) + p[2, e]) + ...)

Grid (blocks of elements, reductions): up to three share a launch, since each is a few microseconds' work and a launch
takes the host as long. fp32 with Kahan's compensation, so that the error does not grow with the number of shares (a
plain chain of 64 would cost more than the library's pairwise sums, and is no faster: the kernel waits for memory); one
rounding to out's dtype.

The chain is over the shares, of which dyb has one for each tile of dy's columns, and a rank-sized result has few
programs: without loads far ahead of their additions, each share would cost the memory's whole latency.
"""

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from lora_kernels.kernels.device import kahan_add
from lora_kernels.kernels.launch import ceil_div, launch

BLOCK = 512  # of fp32: one 16-byte load of each thread
STAGES = 8
MOST = 3  # reductions of a launch


@triton.jit
def _reduce(partials_ptr, out_ptr, splits, elements, scale, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    if first < elements:
        offs = first + tl.arange(0, BLOCK)
        mask = offs < elements
        acc = tl.zeros((BLOCK,), tl.float32)
        lost = tl.zeros((BLOCK,), tl.float32)
        ptrs = partials_ptr + offs
        for _ in tl.range(0, splits, num_stages=STAGES):
            acc, lost = kahan_add(acc, lost, tl.load(ptrs, mask=mask, other=0.0))
            ptrs += elements
        tl.store(out_ptr + offs, (acc * tl.cast(scale, tl.float32)).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["splits_0", "splits_1", "splits_2"])
def reduce_partials_kernel(
    partials_0_ptr, partials_1_ptr, partials_2_ptr, out_0_ptr, out_1_ptr, out_2_ptr,
    splits_0, splits_1, splits_2, elements_0, elements_1, elements_2, scale_0, scale_1, scale_2,
    COUNT: tl.constexpr, LAUNCHES_DEPENDENTS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    if LAUNCHES_DEPENDENTS:  # as in `shrink`
        gdc_launch_dependents()
    if COUNT == 1 or tl.program_id(1) == 0:
        _reduce(partials_0_ptr, out_0_ptr, splits_0, elements_0, scale_0, BLOCK, STAGES)
    elif COUNT == 2 or tl.program_id(1) == 1:
        _reduce(partials_1_ptr, out_1_ptr, splits_1, elements_1, scale_1, BLOCK, STAGES)
    else:
        _reduce(partials_2_ptr, out_2_ptr, splits_2, elements_2, scale_2, BLOCK, STAGES)


class Reduction(NamedTuple):
    """out = scale * partials.sum(0)."""

    partials: Tensor
    """[splits, *] fp32, contiguous."""
    out: Tensor
    """[*], contiguous."""
    scale: float = 1.0


def reduce_partials(reductions: Sequence[Reduction], *, launches_dependents: bool = False) -> None:
    """Writes one to three of them."""
    missing = (None,) * (MOST - len(reductions))
    elements = [reduction.out.numel() for reduction in reductions]
    launch(
        reduce_partials_kernel, (ceil_div(max(elements), BLOCK), len(reductions)),
        *[reduction.partials for reduction in reductions], *missing,
        *[reduction.out for reduction in reductions], *missing,
        *[reduction.partials.shape[0] for reduction in reductions], *missing,
        *elements, *missing,
        *[reduction.scale for reduction in reductions], *missing,
        COUNT=len(reductions), LAUNCHES_DEPENDENTS=launches_dependents, BLOCK=BLOCK, STAGES=STAGES, num_warps=4,
    )  # fmt: skip
