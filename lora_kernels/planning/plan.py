"""Problem → Plan: the backend, the strategy, the tiles and the reason, from rules in one place.

The rules are arithmetic, not yet measurements. One pass over [M, N] in 2 bytes costs about 184 / K of the base GEMM on
an H200, so what decides is how many passes a composition makes and whether a GEMM of ours must compete with the
library's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from lora_kernels.errors import ArgumentError, UnsupportedError
from lora_kernels.planning import tiles
from lora_kernels.planning.tiles import Family, Tile, Width

Backend = Literal["torch", "triton", "reference"]
Strategy = Literal["library", "upcast", "one_pass", "shrink_fused", "eager"]

UPCAST_ROWS = 16
"""From this M on, converting the weight to fp32 costs less than what a 16-bit CPU GEMM without hardware loses."""
SPLITS_MAX = 64
ONE_PASS_STEPS = 4
"""Steps of K that a split of `one_pass` has at least, to be worth its share of the partial sums."""
OLDEST_SM = 80


@dataclass(frozen=True)
class Problem:
    """What a plan depends on. dropout: whether a mask is applied; arch: "sm_90", "gfx942", or the device's type."""

    M: int
    N: int
    K: int
    R: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    dropout: bool
    arch: str
    device_type: str
    sm_count: int = 1
    tf32: bool = False
    interpreted: bool = False

    @property
    def width(self) -> Width:
        """Which column of the tile table serves these dtypes."""
        if self.dtype == torch.float32:
            return "32"
        return "16" if self.adapter_dtype == self.dtype else "mixed"

    @property
    def family(self) -> Family:
        """The GPU's family; an unknown one is given the least shared memory of its vendor."""
        unknown: Family = "cdna3" if self.arch.startswith("gfx") else "ada"
        return tiles.FAMILY_OF_ARCH.get(self.arch, unknown)


@dataclass(frozen=True)
class Plan:
    """What will run, and why.

    Attributes:
        backend: "torch" (library GEMMs), "triton" or "reference".
        strategy: "library" GEMMs in x's dtype, "upcast" to fp32 block by block, "one_pass", "shrink_fused", or "eager".
        reason: one sentence.
        precision: how fp32 operands are multiplied: "ieee", "tf32" or "tf32x3".
        use_tma: whether the large GEMMs may use tensor descriptors.
        use_pdl: whether the forward's GEMM may start before the shrink ends (programmatic dependent launch, with TMA).
        dy_reads: 1 where dyb and dB share one read of dy; 2 where the shares of dyb would outweigh dy.
        one_pass_splits: how many programs share K under one_pass; past 1, a second launch adds what they found.
        xa_splits, dyb_splits, d_lora_A_splits, d_lora_B_splits: how many programs share each reduction.
        dx_lora_A_splits: the same for dA where one kernel computes it beside the low-rank part of dx, under dropout.
        tiles: the tile of each kernel, by the kernel's name.
    """

    backend: Backend
    strategy: Strategy
    reason: str
    precision: str = "ieee"
    use_tma: bool = False
    use_pdl: bool = False
    dy_reads: int = 1
    one_pass_splits: int = 1
    xa_splits: int = 1
    dyb_splits: int = 1
    d_lora_A_splits: int = 1  # noqa: N815 - the tensor's name
    d_lora_B_splits: int = 1  # noqa: N815
    dx_lora_A_splits: int = 1  # noqa: N815
    tiles: tuple[tuple[str, Tile], ...] = ()

    def tile(self, kernel: str) -> Tile:
        """The tile of one kernel."""
        return dict(self.tiles)[kernel]


@cache
def _cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of `dtype` in hardware; unknown counts as yes (the library knows best)."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if capabilities.get("architecture") != "x86_64":
        return True
    names = ("avx512_bf16", "amx_bf16") if dtype == torch.bfloat16 else ("avx512_fp16", "amx_fp16")
    return any(capabilities.get(name, False) for name in names)


def obstacle_to_triton(
    dtype: torch.dtype, arch: str, device_type: str, *, interpreted: bool, triton_available: bool
) -> str | None:
    """The reason why the triton backend cannot serve x of this dtype there, or None if it can."""
    if dtype == torch.float64:
        return "the kernels compute in fp32, fp16 and bf16; fp64 is served by 'torch' and 'reference'"
    if not triton_available:
        return "triton is not installed"
    if device_type == "cpu":
        hint = "set TRITON_INTERPRET=1 before the import to run the kernels in Triton's interpreter"
        return None if interpreted else f"tensors are on the CPU; {hint}"
    if interpreted:
        return "TRITON_INTERPRET is set, and the interpreter runs on CPU tensors"
    if device_type != "cuda":
        return f"the kernels run on CUDA and ROCm devices, not on {device_type!r}"
    if arch.startswith("sm_") and int(arch[3:]) < OLDEST_SM:
        return f"{arch} is older than sm_{OLDEST_SM}, the oldest NVIDIA GPU the kernels are compiled for"
    return None


def _torch_plan(problem: Problem, reason: str) -> Plan:
    half = problem.dtype in (torch.float16, torch.bfloat16)
    if problem.device_type == "cpu" and half and problem.M >= UPCAST_ROWS and not _cpu_multiplies(problem.dtype):
        name = str(problem.dtype).removeprefix("torch.")
        return Plan(
            "torch", "upcast", f"{reason}; this CPU has no {name} matrix instructions, so blocks are computed in fp32"
        )
    return Plan("torch", "library", reason)


def _is_decode(problem: Problem) -> bool:
    """Whether one_pass reads the weight once: one row of tiles. So few rows make the mask cheap, too."""
    if tiles.ONE_PASS_RANK[problem.width] < problem.R:
        return False
    return tiles.one_pass_tile(problem.family, problem.width, problem.M, problem.R).block_m >= problem.M


def _triton_plan(problem: Problem, reason: str) -> Plan:
    family, width, m, rank = problem.family, problem.width, problem.M, problem.R
    nvidia = family != "cdna3"
    table = {
        "gemm_expand": tiles.gemm_tile(family, width, m, rank, dropout=False),
        "gemm_expand_dropout": tiles.gemm_tile(family, width, m, rank, dropout=True),
        "shrink": tiles.shrink_tile(family, width, rank),
        "bwd_lora_b": tiles.bwd_lora_b_tile(family, width, rank),
        "bwd_lora_a": tiles.bwd_lora_a_tile(family, width, rank),
        "bwd_dx_lora_a_dropout": tiles.bwd_dx_lora_a_tile(family, width, rank),
    }
    one_pass_splits = 1
    if rank <= tiles.ONE_PASS_RANK[width]:
        one_pass = table["one_pass"] = tiles.one_pass_tile(family, width, m, rank)
        table["one_pass_sum"] = tiles.one_pass_sum_tile(width, rank)
        one_pass_splits = _splits(
            problem,
            _tiles(m, one_pass.block_m) * _tiles(problem.N, one_pass.block_n),
            problem.K // (ONE_PASS_STEPS * one_pass.block_k),
        )
    if tiles.has_tma(family, width):
        table["gemm_expand_tma"] = tiles.gemm_tma_tile(family, width, m, rank, dropout=False)
        table["gemm_expand_tma_dropout"] = tiles.gemm_tma_tile(family, width, m, rank, dropout=True)
    precision = "ieee"  # the only choice on AMD, whose matrix units multiply fp32
    if nvidia and width == "mixed":
        precision = "tf32x3"
    elif nvidia and problem.tf32:
        precision = "tf32"
    n, k = problem.N, problem.K
    shrink, lora_a, lora_b = table["shrink"], table["bwd_lora_a"], table["bwd_lora_b"]
    dx_lora_a = table["bwd_dx_lora_a_dropout"]
    shrink_tiles = _tiles(m, shrink.block_m) * _tiles(rank, shrink.block_r)
    # Each column tile of dy writes M R fp32 shares of dyb: more than the dy that a second read would cost, and not one.
    shares_outweigh_dy = 4 * rank > lora_b.block_n * problem.dtype.itemsize
    one_read = rank <= lora_b.block_r and not shares_outweigh_dy
    use_tma = "gemm_expand_tma" in table and not problem.interpreted
    return Plan(
        backend="triton",
        strategy="one_pass" if _is_decode(problem) else "shrink_fused",
        reason=reason,
        precision=precision,
        dy_reads=1 if one_read else 2,
        use_tma=use_tma,
        use_pdl=use_tma,  # sm_90 brought both
        one_pass_splits=one_pass_splits,
        xa_splits=_splits(problem, shrink_tiles, _tiles(k, shrink.block_k)),
        dyb_splits=_splits(problem, shrink_tiles, _tiles(n, shrink.block_k)),
        d_lora_A_splits=_splits(
            problem, _tiles(k, lora_a.block_k) * _tiles(rank, lora_a.block_r), _tiles(m, lora_a.block_m)
        ),
        d_lora_B_splits=_splits(
            problem, _tiles(n, lora_b.block_n) * _tiles(rank, lora_b.block_r), _tiles(m, lora_b.block_m)
        ),
        dx_lora_A_splits=_splits(
            problem, _tiles(k, dx_lora_a.block_k) * _tiles(rank, dx_lora_a.block_r), _tiles(m, dx_lora_a.block_m)
        ),
        tiles=tuple(table.items()),
    )


def _tiles(size: int, block: int) -> int:
    return -(-size // block)


def _splits(problem: Problem, programs: int, steps: int) -> int:
    """How many ways to split a reduction of `steps` so that about one program sits on every multiprocessor."""
    return max(1, min(problem.sm_count // max(programs, 1), steps, SPLITS_MAX))


def make_plan(problem: Problem, backend: str, *, triton_available: bool) -> Plan:
    """The plan for one problem; an explicit backend is honoured or raises, only "auto" chooses.

    Raises:
        UnsupportedError: the named backend cannot serve the problem; the message says why.
    """
    if backend == "reference":
        return Plan("reference", "eager", "asked for by name")
    if backend not in ("auto", "torch", "triton"):
        raise ArgumentError(f"backend must be 'auto', 'torch', 'triton' or 'reference'; got {backend!r}.")
    obstacle = obstacle_to_triton(
        problem.dtype, problem.arch, problem.device_type,
        interpreted=problem.interpreted, triton_available=triton_available,
    )  # fmt: skip
    if backend == "torch":
        return _torch_plan(problem, "asked for by name")
    if backend == "triton":
        if obstacle:
            raise UnsupportedError(
                f"backend='triton' cannot serve this problem: {obstacle}. Use backend='auto' to fall back."
            )
        return _triton_plan(problem, "asked for by name")
    if problem.device_type == "cpu":
        return _torch_plan(problem, "tensors are on the CPU, which library GEMMs serve best")
    if obstacle:
        return _torch_plan(problem, obstacle)
    if _is_decode(problem):
        return _triton_plan(problem, "few rows: the weight's bytes are the cost, and one pass reads them once")
    if problem.dropout:
        return _triton_plan(
            problem, "dropout: the mask is recomputed in registers; in library calls it would be passes over x"
        )
    if problem.width == "mixed":
        return _triton_plan(problem, "fp32 adapters on a 16-bit base: the kernels multiply them without casting x")
    return _torch_plan(problem, "no measurement of this GPU says that a fused GEMM beats the library's at this M")
