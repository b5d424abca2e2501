"""`gemm_expand` with its large operands moved by the tensor memory accelerator (sm_90 and later).

    out = lhs rhs + bias + mask * (s e)

Grid and arithmetic are those of `gemm_expand`; lhs, rhs and out are host-side tensor descriptors, so that the main loop
holds no pointers and no masks: a tile that hangs over an edge is read as zeros and stored in part. The rank-sized s and
e stay pointers. Needs unit stride in the last dimension and 16-byte alignment elsewhere (`tma_serves`).

Under USE_PDL (programmatic dependent launch) the grid starts while the kernel right before it in the stream, which
writes s, still runs: its main loop fills the multiprocessors that the other leaves. Why that is safe:

- That kernel (`shrink`, or `reduce_partials` where shrink was split) is an ordinary launch: once any of it runs, all
  that came before in the stream is complete and visible. Our grid starts after all of its programs have begun, so lhs,
  weight, bias, e and seed, which it does not write, may be read at once.
- Every program waits (griddepcontrol.wait: the earlier grid complete, its writes visible) before the first read of s
  and before the first write of out. So out may lie where the caching allocator had memory that the earlier grid still
  reads, such as the shares of a split shrink, freed as soon as they were queued; users further back are complete.
- A kernel that slips in between (PyTorch fills fresh memory in its deterministic mode) is an ordinary launch, which
  starts after the shrink is complete; the wait then covers that kernel.
- As every program waits, our grid does not complete before the other; and kernels after ours are ordinary launches,
  which wait for it. Two dependent launches in a row would need the argument anew.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_kernels.kernels.device import expand_into, grouped_tile, load_seed
from lora_kernels.kernels.launch import ceil_div, has_offset, launch
from lora_kernels.planning.tiles import Tile

ALIGNMENT_BYTES = 16


@triton.jit(do_not_specialize=["M", "threshold"])  # one binary for every number of tokens and every p
def gemm_expand_tma_kernel(
    lhs_desc, rhs_desc, out_desc, s_ptr, e_ptr, bias_ptr, seed_ptr,
    M, N, K, R, threshold, gain,
    stride_s_m, stride_e_r, stride_e_n,
    RHS_IS_NK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_OFFSET: tl.constexpr,
    USE_PDL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    first_m, first_n = pid_m * BLOCK_M, pid_n * BLOCK_N

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        lhs = lhs_desc.load([first_m, k])  # [BLOCK_M, BLOCK_K]
        # [BLOCK_K, BLOCK_N]; a constexpr choice: choosing a descriptor at run time would break the pipeline
        if RHS_IS_NK:
            rhs = rhs_desc.load([first_n, k]).T
        else:
            rhs = rhs_desc.load([k, first_n])
        acc = tl.dot(lhs, rhs, acc, input_precision=PRECISION)

    if USE_PDL:  # inline assembly: not for the interpreter
        gdc_wait()
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    if HAS_BIAS:  # before the expand: after it, a bias in fp32 spills 8 B a thread on sm_100 (tests/compile)
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    seed = load_seed(seed_ptr, HAS_OFFSET) if HAS_DROPOUT else 0
    acc = expand_into(
        acc, s_ptr, e_ptr, seed, threshold, gain,
        M, N, R, offs_m, offs_n, first_n,
        stride_s_m, stride_e_r, stride_e_n,
        HAS_DROPOUT, s_ptr.dtype.element_ty != out_desc.dtype, PRECISION, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    out_desc.store([first_m, first_n], acc.to(out_desc.dtype))


def tma_serves(*tensors: Tensor) -> bool:
    """Whether every [rows, columns] tensor can be described: unit column stride, aligned base and row stride."""
    return all(
        t.stride(1) == 1
        and t.stride(0) >= t.shape[1]
        and t.stride(0) * t.element_size() % ALIGNMENT_BYTES == 0
        and t.data_ptr() % ALIGNMENT_BYTES == 0
        for t in tensors
    )


def gemm_expand_tma(
    *,
    lhs: Tensor,
    weight: Tensor,
    transpose_weight: bool,
    s: Tensor,
    e: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    threshold: int,
    gain: float = 1.0,
    use_pdl: bool,
    precision: str,
    tile: Tile,
) -> Tensor:
    """lhs [M, K] @ rhs + bias + gain mask * (s @ e); rhs is weight [K, N], or its transpose where weight is [N, K].

    use_pdl: the launch right before this one, in the same stream, is the one that writes s.
    """
    (m, k), n = lhs.shape, weight.shape[0 if transpose_weight else 1]
    out = torch.empty((m, n), dtype=lhs.dtype, device=lhs.device)
    weight_block = [tile.block_n, tile.block_k] if transpose_weight else [tile.block_k, tile.block_n]
    grid = (ceil_div(m, tile.block_m) * ceil_div(n, tile.block_n),)
    launch(
        gemm_expand_tma_kernel, grid,
        TensorDescriptor.from_tensor(lhs, [tile.block_m, tile.block_k]),
        TensorDescriptor.from_tensor(weight, weight_block),
        TensorDescriptor.from_tensor(out, [tile.block_m, tile.block_n]),
        s, e, bias, seed,
        m, n, k, s.shape[1], threshold, gain,
        s.stride(0), *e.stride(),
        RHS_IS_NK=transpose_weight, HAS_BIAS=bias is not None, HAS_DROPOUT=seed is not None,
        HAS_OFFSET=has_offset(seed), USE_PDL=use_pdl, PRECISION=precision,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BLOCK_R=tile.block_r, GROUP_M=tile.group_m,
        num_warps=tile.num_warps, num_stages=tile.num_stages, launch_pdl=use_pdl,
    )  # fmt: skip
    return out
