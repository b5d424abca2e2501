"""The large GEMM with its expand on Hopper: persistent, warp-specialised, written in Gluon (sm_90a).

    out = lhs rhs + bias + gain s e

Grid (one program on a multiprocessor, as many as the waves need); each walks every grid-th tile of out, in the grouped
order of `gemm_expand`.
Operands as in `gemm_expand_tma`, with s and e described, too. One warp loads and two warpgroups multiply:

    produce   step by step, lhs [BLOCK_M, BLOCK_K] and rhs [BLOCK_K, BLOCK_N] into the next slot of a ring
    consume   the upper or the lower half of a slot's rows, then of out's, 64 columns at a time

The expand is ceil(R / BLOCK_K) more steps over [s | e] after the ceil(K / BLOCK_K) over [lhs | rhs]: no register and no
byte of shared memory for any rank. Columns past R arrive as zeros, and only the first BLOCK_R columns of the expand's
steps are multiplied, which is all of BLOCK_K or at least R. Scaling is already inside s, but for gain, as in
`gemm_expand`: an fp16 product is drained and divided by it before the expand. There is no dropout. The same bits every
time: each element is one chain of additions in the order of k.

The protocol, argued in docs/design/persistent.md: `full[slot]` completes when the bytes of a step have landed,
`empty[slot]` when both consumers have read them. Step i has slot i mod STAGES and waits for parity (i div STAGES) mod 2
of `full`, or for the other one of `empty`, which counts as completed before the first arrival. No interpreter runs
Gluon: tests/unit runs this source against a model of the hardware, tests/compile reads the machine code.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels.device import grouped_tile, with_gain, without_gain
from lora_kernels.kernels.gemm_expand_tma import ALIGNMENT_BYTES, tma_serves
from lora_kernels.kernels.interpreter import is_interpreting
from lora_kernels.kernels.launch import ceil_div, launch
from lora_kernels.planning.tiles import Tile, fewest_programs

MISSING = ""
"""What this Triton lacks of Gluon; the functions below then stay plain Python, which nothing can launch."""
try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    # Triton 3.8 renamed the copies and kept the old names, 3.9 keeps those only to raise; 3.6 and 3.7 know no others.
    load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
    store_tile = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
except (ImportError, AttributeError) as error:
    MISSING = str(error)


def jit(fn: Callable[..., Any], **options: Any) -> Any:
    return fn if MISSING else gluon.jit(fn, **options)


CONSUMERS = tl.constexpr(2)  # warpgroups
CHUNK = tl.constexpr(64)  # columns of out in one store: the 128 bytes of the widest swizzle
CHUNKS_IN_FLIGHT = tl.constexpr(2)  # of each consumer: one is stored while the next is written
# A thread's, of 3 x 168 that three warpgroups have. 64 x 256 accumulators take 128, so that 240 spill nothing.
CONSUMER_REGISTERS, LOADER_REGISTERS = tl.constexpr(240), tl.constexpr(24)
LOADER_WARPS = tl.constexpr(1)  # of its warpgroup, whose other three idle


# -- what both sides count by; plain arithmetic, which tests/unit runs as Python ---------------------------------------


@jit
def steps_over(size, BLOCK_K: tl.constexpr):
    return (size + BLOCK_K - 1) // BLOCK_K


@jit
def slot_of(step, STAGES: tl.constexpr):
    return step % STAGES


@jit
def parity_of(step, STAGES: tl.constexpr):
    return step // STAGES & 1


# -- the loading warp --------------------------------------------------------------------------------------------------


@jit
def load_step(
    step, lhs_desc, rhs_desc, first_m, first_n, first_k, lhs_ring, rhs_ring, full, empty,
    STAGES: tl.constexpr, RHS_IS_NK: tl.constexpr,
):  # fmt: skip
    slot = slot_of(step, STAGES)
    mbarrier.wait(empty.index(slot), parity_of(step, STAGES) ^ 1)
    landed = full.index(slot)
    # Whole blocks, also at an edge: what lies outside arrives as zeros and counts.
    mbarrier.expect(landed, lhs_desc.block_type.nbytes + rhs_desc.block_type.nbytes)
    load_tile(lhs_desc, [first_m, first_k], landed, lhs_ring.index(slot))
    if RHS_IS_NK:
        load_tile(rhs_desc, [first_n, first_k], landed, rhs_ring.index(slot))
    else:
        load_tile(rhs_desc, [first_k, first_n], landed, rhs_ring.index(slot))
    return step + 1


@jit
def produce(
    lhs_desc, rhs_desc, s_desc, e_desc, lhs_ring, rhs_ring, full, empty, M, N, K, R,
    RHS_IS_NK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    num_m, num_n = steps_over(M, BLOCK_M), steps_over(N, BLOCK_N)
    step = 0
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        pid_m, pid_n = grouped_tile(tile, num_m, num_n, GROUP_M)
        first_m, first_n = pid_m * BLOCK_M, pid_n * BLOCK_N
        for i in range(steps_over(K, BLOCK_K)):
            step = load_step(step, lhs_desc, rhs_desc, first_m, first_n, i * BLOCK_K, lhs_ring, rhs_ring, full, empty,
                             STAGES, RHS_IS_NK)  # fmt: skip
        for i in range(steps_over(R, BLOCK_K)):
            step = load_step(step, s_desc, e_desc, first_m, first_n, i * BLOCK_K, lhs_ring, rhs_ring, full, empty,
                             STAGES, RHS_IS_NK)  # fmt: skip


# -- the multiplying warpgroups ----------------------------------------------------------------------------------------


@jit
def multiply_step(
    step, acc, accumulate, lhs_ring, rhs_ring, full, empty,
    FIRST_ROW: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr, RHS_IS_NK: tl.constexpr,
):  # fmt: skip
    slot = slot_of(step, STAGES)
    mbarrier.wait(full.index(slot), parity_of(step, STAGES))
    lhs = lhs_ring.index(slot).slice(FIRST_ROW, ROWS, 0)  # [ROWS, BLOCK_K]
    rhs = rhs_ring.index(slot)
    if RHS_IS_NK:
        rhs = rhs.permute((1, 0))  # [BLOCK_K, BLOCK_N]
    if lhs.shape[1] > WIDTH:
        lhs, rhs = lhs.slice(0, WIDTH, 1), rhs.slice(0, WIDTH, 0)
    # A tile's first product overwrites acc, which still holds the tile before: nothing sets 128 registers to zero.
    acc = warpgroup_mma(lhs, rhs, acc, use_acc=accumulate, is_async=True)
    # One product stays in flight: the step before has been read, and its slot goes back to the loading warp. A tile's
    # last slot goes back after its last product, so its first product has none to give back.
    acc = warpgroup_mma_wait(1, deps=[acc])
    mbarrier.arrive(empty.index(slot_of(step + STAGES - 1, STAGES)), count=1, pred=accumulate)
    return step + 1, acc


@jit
def store_columns(t, out_desc, first_m, first_n, chunks, COLUMN: tl.constexpr, SLOT: tl.constexpr):
    """t [ROWS, columns] to out, by halves down to chunks; halving moves no data, for a thread has columns of both."""
    COLUMNS: gl.constexpr = t.shape[1]
    if COLUMNS == CHUNK:
        chunk = chunks.index(SLOT + COLUMN // CHUNK % CHUNKS_IN_FLIGHT)
        tma.store_wait(CHUNKS_IN_FLIGHT - 1)  # the last store from this chunk has read it
        chunk.store(t.to(out_desc.dtype))
        fence_async_shared()
        store_tile(out_desc, [first_m, first_n + COLUMN], chunk)
    else:
        left, right = t.reshape([t.shape[0], 2, COLUMNS // 2]).permute(0, 2, 1).split()
        store_columns(left, out_desc, first_m, first_n, chunks, COLUMN, SLOT)
        store_columns(right, out_desc, first_m, first_n, chunks, COLUMN + COLUMNS // 2, SLOT)


@jit
def consume(
    out_desc, bias_ptr, lhs_ring, rhs_ring, chunks, full, empty, M, N, K, R, gain,
    HAS_BIAS: tl.constexpr, RHS_IS_NK: tl.constexpr, CONSUMER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = BLOCK_M // CONSUMERS
    FIRST_ROW: gl.constexpr = ROWS * CONSUMER
    SLOT: gl.constexpr = CHUNKS_IN_FLIGHT * CONSUMER
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    # The bias is read along the threads and spread at the end: read as the accumulators lie, it was 64 masked loads a
    # thread and 700 instructions before the first product of each tile.
    along: gl.constexpr = gl.BlockedLayout([BLOCK_N // 128], [32], [4], [0])
    num_m, num_n = steps_over(M, BLOCK_M), steps_over(N, BLOCK_N)
    step = 0
    acc = gl.zeros((ROWS, BLOCK_N), gl.float32, mma)
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        pid_m, pid_n = grouped_tile(tile, num_m, num_n, GROUP_M)
        first_m, first_n = pid_m * BLOCK_M + FIRST_ROW, pid_n * BLOCK_N
        if HAS_BIAS:
            offs_n = first_n + gl.arange(0, BLOCK_N, along)
            bias = gl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)
        for i in range(steps_over(K, BLOCK_K)):
            step, acc = multiply_step(step, acc, i > 0, lhs_ring, rhs_ring, full, empty, FIRST_ROW, ROWS, BLOCK_K,
                                      STAGES, RHS_IS_NK)  # fmt: skip
        if lhs_ring.dtype == gl.float16:
            acc = warpgroup_mma_wait(0, deps=[acc])
            acc = without_gain(acc, gain, lhs_ring.dtype)
        for _ in range(steps_over(R, BLOCK_K)):
            step, acc = multiply_step(step, acc, True, lhs_ring, rhs_ring, full, empty, FIRST_ROW, ROWS, BLOCK_R,
                                      STAGES, RHS_IS_NK)  # fmt: skip
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(slot_of(step - 1, STAGES)), count=1)
        acc = with_gain(acc, gain, lhs_ring.dtype)
        if HAS_BIAS:
            acc += gl.convert_layout(bias, gl.SliceLayout(0, mma)).to(gl.float32)[None, :]
        store_columns(acc, out_desc, first_m, first_n, chunks, 0, SLOT)
    tma.store_wait(0)  # shared memory goes with the program, so the last stores must have read it


@partial(jit, do_not_specialize=["M", "N", "K", "R"])  # one binary for every size
def persistent_kernel(
    lhs_desc, rhs_desc, s_desc, e_desc, out_desc, bias_ptr,
    M, N, K, R, gain,
    HAS_BIAS: tl.constexpr, RHS_IS_NK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    gl.static_assert(STAGES > 1)  # a slot goes back only once the next step's product has been issued
    # A consumer that stores an odd number of chunks would come back to the chunk it has just handed over.
    gl.static_assert(BLOCK_N // CHUNK % CHUNKS_IN_FLIGHT == 0)
    gl.static_assert(gl.num_warps() == 4)  # one warpgroup is the default partition, the rest are asked for below
    lhs_ring = gl.allocate_shared_memory(lhs_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], lhs_desc.layout)
    if RHS_IS_NK:
        rhs_ring = gl.allocate_shared_memory(rhs_desc.dtype, [STAGES, BLOCK_N, BLOCK_K], rhs_desc.layout)
    else:
        rhs_ring = gl.allocate_shared_memory(rhs_desc.dtype, [STAGES, BLOCK_K, BLOCK_N], rhs_desc.layout)
    chunks = gl.allocate_shared_memory(
        out_desc.dtype, [CONSUMERS * CHUNKS_IN_FLIGHT, BLOCK_M // CONSUMERS, CHUNK], out_desc.layout
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)  # the expectation; the bytes are counted beside it
        mbarrier.init(empty.index(slot), count=CONSUMERS)
    fence_async_shared()  # the accelerator signals barriers that ordinary stores have made
    gl.warp_specialize(
        [
            (consume, (out_desc, bias_ptr, lhs_ring, rhs_ring, chunks, full, empty, M, N, K, R, gain, HAS_BIAS,
                       RHS_IS_NK, 0, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, GROUP_M, STAGES)),
            (consume, (out_desc, bias_ptr, lhs_ring, rhs_ring, chunks, full, empty, M, N, K, R, gain, HAS_BIAS,
                       RHS_IS_NK, 1, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, GROUP_M, STAGES)),
            (produce, (lhs_desc, rhs_desc, s_desc, e_desc, lhs_ring, rhs_ring, full, empty, M, N, K, R, RHS_IS_NK,
                       BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES)),
        ],
        [4, LOADER_WARPS],
        [CONSUMER_REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip


class Availability(NamedTuple):
    """Whether the kernel can be compiled here, and what stands in the way; true or false as a whole."""

    ok: bool
    reason: str

    def __bool__(self) -> bool:
        return self.ok


def persistent_available() -> Availability:
    """Whether this Triton has what the kernel is written in; which GPU it runs on (sm_90) is the planner's to know."""
    if MISSING:
        return Availability(False, f"Triton {triton.__version__} lacks a part of Gluon: {MISSING}")
    if is_interpreting():
        return Availability(False, "Triton's interpreter does not run Gluon")
    return Availability(True, "")


def persistent_serves(
    *, lhs: Tensor, weight: Tensor, transpose_weight: bool, s: Tensor | None = None, e: Tensor | None = None
) -> bool:
    """Whether all are of one 16-bit dtype and can be described, e laid out as weight is: N, R and K by eights, then.

    No s and e: those will be made as they have to be.
    """
    n = weight.shape[0 if transpose_weight else 1]
    there = [lhs, weight]
    if s is not None and e is not None:
        there += [s, e.T if transpose_weight else e]
    return (
        lhs.element_size() == 2
        and all(t.dtype == lhs.dtype for t in there)
        and n * lhs.element_size() % ALIGNMENT_BYTES == 0
        and tma_serves(*there)
    )


def persistent(
    *,
    lhs: Tensor,
    weight: Tensor,
    transpose_weight: bool,
    s: Tensor,
    e: Tensor,
    bias: Tensor | None,
    gain: float = 1.0,
    tile: Tile,
    sm_count: int,
) -> Tensor:
    """lhs [M, K] @ rhs + bias [N] + gain s [M, R] @ e [R, N]; rhs is weight [K, N], or its transpose where [N, K]."""
    (m, k), n = lhs.shape, weight.shape[0 if transpose_weight else 1]
    out = torch.empty((m, n), dtype=lhs.dtype, device=lhs.device)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    lhs_block = [tile.block_m, tile.block_k]
    rhs_block = [tile.block_n, tile.block_k] if transpose_weight else [tile.block_k, tile.block_n]
    tiles = ceil_div(m, tile.block_m) * ceil_div(n, tile.block_n)
    launch(
        persistent_kernel, (fewest_programs(tiles, sm_count),),
        TensorDescriptor.from_tensor(lhs, lhs_block, layout),
        TensorDescriptor.from_tensor(weight, rhs_block, layout),
        TensorDescriptor.from_tensor(s, lhs_block, layout),
        TensorDescriptor.from_tensor(e.T if transpose_weight else e, rhs_block, layout),
        TensorDescriptor.from_tensor(out, [tile.block_m // CONSUMERS.value, CHUNK.value], layout),
        bias,
        m, n, k, s.shape[1], gain,
        HAS_BIAS=bias is not None, RHS_IS_NK=transpose_weight,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BLOCK_R=tile.block_r,
        GROUP_M=tile.group_m, STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )  # fmt: skip
    return out
