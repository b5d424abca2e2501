"""The large GEMM with its expand on Hopper: persistent, warp-specialised, written in Gluon (sm_90a).

    out = lhs rhs + bias + s e

Grid (one program for each multiprocessor), each walking every grid-th tile of out in the grouped order of `gemm_expand`;
operands as in `gemm_expand_tma`, but s and e are described too. One warp loads, two warpgroups multiply:

    produce   step by step, [BLOCK_M, BLOCK_K] of lhs and [BLOCK_K, BLOCK_N] of rhs into the next slot of a ring
    consume   the upper or lower BLOCK_M / 2 rows of each slot, then the same rows of out, 64 columns at a time

The expand is ceil(R / BLOCK_K) more steps over [s | e] after the ceil(K / BLOCK_K) of [lhs | rhs]: no register and no
byte of shared memory for any rank. Columns past R are zeros from the tensor memory accelerator, of which the
consumers multiply only the first BLOCK_R. Scaling is already inside s; there is no dropout. The same bits every time:
each element is one chain of fp32 additions in the order of k.

The protocol, argued in docs/design/persistent.md: `full[slot]` completes when the bytes of a step have landed,
`empty[slot]` when both consumers have read them; step i uses slot i mod STAGES, and waits for parity (i div STAGES) mod 2
of `full` or the opposite one of `empty`, which a fresh barrier has completed. No interpreter runs Gluon: tests/unit
simulates the protocol from these functions, tests/compile reads the machine code, tests/gpu runs it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels.device import grouped_tile
from lora_kernels.kernels.gemm_expand_tma import ALIGNMENT_BYTES, tma_serves
from lora_kernels.kernels.interpreter import is_interpreting
from lora_kernels.planning.tiles import Tile

MISSING = ""  # what this Triton lacks; with it the functions below stay plain Python and cannot be launched
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

    # Triton 3.8 renamed the copies and kept the old names; 3.9 keeps them only to raise; 3.6 and 3.7 know no others.
    load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
    store_tile = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
    jit: Any = gluon.jit
except (ImportError, AttributeError) as error:
    MISSING = str(error)

    def jit(fn: Any = None, **options: Any) -> Any:
        return fn if fn is not None else lambda given: given


CONSUMERS = tl.constexpr(2)
CHUNK = tl.constexpr(64)  # columns of out in one store: the 128 bytes of the widest swizzle
CHUNKS_IN_FLIGHT = tl.constexpr(2)  # of each consumer: one is stored while the next is written
LOADER_REGISTERS = tl.constexpr(24)
CONSUMER_REGISTERS = tl.constexpr(240)  # 64 x 256 fp32 take 128; 2 x 240 + 24 is what 384 threads have, 3 x 168


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
def load_step(step, lhs_desc, rhs_desc, first_m, first_n, first_k, lhs_ring, rhs_ring, full, empty, STAGES: tl.constexpr,
              RHS_IS_NK: tl.constexpr):  # fmt: skip
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
def multiply_step(step, acc, is_first, lhs_ring, rhs_ring, full, empty, FIRST_ROW: tl.constexpr, ROWS: tl.constexpr,
                  WIDTH: tl.constexpr, STAGES: tl.constexpr, RHS_IS_NK: tl.constexpr):  # fmt: skip
    slot = slot_of(step, STAGES)
    mbarrier.wait(full.index(slot), parity_of(step, STAGES))
    lhs = lhs_ring.index(slot).slice(FIRST_ROW, ROWS, 0)  # [ROWS, BLOCK_K]
    rhs = rhs_ring.index(slot)
    if RHS_IS_NK:
        rhs = rhs.permute((1, 0))  # [BLOCK_K, BLOCK_N]
    if WIDTH < lhs.shape[1]:
        lhs, rhs = lhs.slice(0, WIDTH, 1), rhs.slice(0, WIDTH, 0)
    # The first product of a tile overwrites acc, which still holds the tile before.
    acc = warpgroup_mma(lhs, rhs, acc, use_acc=is_first == 0, is_async=True)
    # One product stays in flight: the step before has been read, and its slot goes back to the loading warp.
    acc = warpgroup_mma_wait(1, deps=[acc])
    mbarrier.arrive(empty.index(slot_of(step + STAGES - 1, STAGES)), count=1, pred=is_first == 0)
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
    out_desc, bias_ptr, lhs_ring, rhs_ring, chunks, full, empty, M, N, K, R,
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
            step, acc = multiply_step(step, acc, i == 0, lhs_ring, rhs_ring, full, empty, FIRST_ROW, ROWS, BLOCK_K,
                                      STAGES, RHS_IS_NK)  # fmt: skip
        for _ in range(steps_over(R, BLOCK_K)):
            step, acc = multiply_step(step, acc, False, lhs_ring, rhs_ring, full, empty, FIRST_ROW, ROWS, BLOCK_R,
                                      STAGES, RHS_IS_NK)  # fmt: skip
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(slot_of(step - 1, STAGES)), count=1)
        if HAS_BIAS:
            acc += gl.convert_layout(bias, gl.SliceLayout(0, mma)).to(gl.float32)[None, :]
        store_columns(acc, out_desc, first_m, first_n, chunks, 0, SLOT)
    tma.store_wait(0)  # shared memory goes with the program, so the last stores must have read it


@jit(do_not_specialize=["M", "N", "K", "R"])  # one binary for every size
def persistent_kernel(
    lhs_desc, rhs_desc, s_desc, e_desc, out_desc, bias_ptr,
    M, N, K, R,
    HAS_BIAS: tl.constexpr, RHS_IS_NK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # A consumer that stores an odd number of chunks would come back to the chunk it has just handed over.
    gl.static_assert(BLOCK_N // CHUNK % CHUNKS_IN_FLIGHT == 0)
    lhs_ring = gl.allocate_shared_memory(lhs_desc.dtype, [STAGES] + lhs_desc.block_type.shape, lhs_desc.layout)
    rhs_ring = gl.allocate_shared_memory(rhs_desc.dtype, [STAGES] + rhs_desc.block_type.shape, rhs_desc.layout)
    chunks = gl.allocate_shared_memory(
        out_desc.dtype, [CONSUMERS * CHUNKS_IN_FLIGHT] + out_desc.block_type.shape, out_desc.layout
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)  # the expectation; the bytes are counted beside it
        mbarrier.init(empty.index(slot), count=CONSUMERS)
    fence_async_shared()  # the accelerator counts on barriers that ordinary stores have made
    gl.warp_specialize(
        [
            (consume, (out_desc, bias_ptr, lhs_ring, rhs_ring, chunks, full, empty, M, N, K, R, HAS_BIAS, RHS_IS_NK, 0,
                       BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, GROUP_M, STAGES)),
            (consume, (out_desc, bias_ptr, lhs_ring, rhs_ring, chunks, full, empty, M, N, K, R, HAS_BIAS, RHS_IS_NK, 1,
                       BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, GROUP_M, STAGES)),
            (produce, (lhs_desc, rhs_desc, s_desc, e_desc, lhs_ring, rhs_ring, full, empty, M, N, K, R, RHS_IS_NK,
                       BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip
