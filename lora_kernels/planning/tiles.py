"""The shipped tiles: for each kernel and family of GPUs, block sizes that fit registers and shared memory.

Set from compile-only figures (tests/compile holds every entry to: no spills, shared memory within the family's limit),
not yet from measured speed. A family is a shared-memory limit and a matrix unit:

    blackwell  sm_100               227 KiB and 512 columns of tensor memory, tcgen05, TMA
    hopper     sm_90                227 KiB, wgmma, TMA
    ampere     sm_80                163 KiB, mma.sync
    ada        sm_86, sm_89, sm_120  99 KiB, mma.sync; also what an unknown NVIDIA GPU gets
    cdna3      gfx942                64 KiB, mfma; also what an unknown AMD GPU gets
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

Family = Literal["blackwell", "hopper", "ampere", "ada", "cdna3"]
Width = Literal["16", "mixed", "32"]
"""Bits of x and adapters: both 16, adapters fp32 over a 16-bit x, both fp32."""

FAMILIES: tuple[Family, ...] = ("blackwell", "hopper", "ampere", "ada", "cdna3")
WIDTHS: tuple[Width, ...] = ("16", "mixed", "32")
FAMILY_OF_ARCH: dict[str, Family] = {
    "sm_80": "ampere",
    "sm_86": "ada",
    "sm_89": "ada",
    "sm_90": "hopper",
    "sm_100": "blackwell",
    "sm_120": "ada",
    "gfx942": "cdna3",
}
MAX_RANK = 512
SMALLEST_DOT = 16


@dataclass(frozen=True)
class Tile:
    """Block sizes and launch options of one kernel; a kernel reads the fields it has."""

    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    block_r: int = 0
    num_warps: int = 4
    num_stages: int = 2
    group_m: int = 8


def _tile(m: int, n: int, k: int, warps: int, stages: int) -> Tile:
    return Tile(block_m=m, block_n=n, block_k=k, num_warps=warps, num_stages=stages)


# GEMM with the expand folded in, from pointers: at training M, and at a few dozen rows. 128 x 256 from pointers takes
# all 255 registers on sm_90 and spills at rank 64, so that size is left to descriptors.
_GEMM: dict[tuple[Family, bool], tuple[Tile, Tile]] = {
    ("blackwell", False): (_tile(128, 128, 64, 8, 3), _tile(64, 64, 64, 4, 3)),
    ("hopper", False): (_tile(128, 128, 64, 8, 3), _tile(64, 64, 64, 4, 3)),
    ("ampere", False): (_tile(128, 128, 64, 8, 3), _tile(64, 64, 64, 4, 3)),
    ("ada", False): (_tile(128, 128, 32, 8, 3), _tile(64, 64, 64, 4, 3)),
    ("cdna3", False): (_tile(128, 128, 32, 8, 2), _tile(64, 64, 64, 4, 2)),
    ("blackwell", True): (_tile(32, 64, 32, 8, 2), _tile(32, 32, 32, 4, 2)),
    ("hopper", True): (_tile(64, 64, 32, 8, 3), _tile(64, 32, 32, 4, 3)),
    ("ampere", True): (_tile(64, 64, 32, 8, 3), _tile(64, 32, 32, 4, 3)),
    ("ada", True): (_tile(64, 64, 32, 8, 3), _tile(64, 32, 32, 4, 3)),
    ("cdna3", True): (_tile(64, 64, 32, 8, 2), _tile(64, 32, 32, 4, 2)),
}
# On sm_100 fp32 adapters' three expand products at 128 x 256 ask for 784 columns of tensor memory.
_GEMM_TMA: dict[Family, tuple[Tile, Tile]] = {
    "blackwell": (_tile(128, 128, 64, 8, 3), _tile(64, 64, 64, 8, 3)),
    "hopper": (_tile(128, 256, 64, 8, 3), _tile(64, 64, 128, 4, 3)),
}
# The dropout mask and a second accumulator live in the epilogue of dx: half the tile.
_GEMM_TMA_DROPOUT = _tile(128, 128, 64, 8, 3)
_GEMM_CDNA3_DROPOUT = _tile(64, 128, 32, 8, 2)
FEW_ROWS = 64
"""Up to this M the tall GEMM tile would be mostly padding."""
ONE_PASS_RANK: dict[Width, int] = {"16": 128, "mixed": 64, "32": 32}
"""Past this rank one_pass spends more on x A^T than on its tile of x W^T, and its accumulators spill."""


def padded_rank(rank: int) -> int:
    """The rank a tile computes: the next power of two, at least what the matrix unit multiplies."""
    return max(SMALLEST_DOT, 1 << (rank - 1).bit_length())


def _expand_rank(width: Width, rank: int) -> int:
    """Step of the expand over the rank; fp32 operands, split or multiplied by FMA, take the registers of wider ones."""
    return SMALLEST_DOT if width != "16" or rank <= SMALLEST_DOT else 64


def gemm_tile(family: Family, width: Width, m: int, rank: int, *, dropout: bool) -> Tile:
    """Tile of `gemm_expand`."""
    few = m <= FEW_ROWS
    tile = _GEMM[family, width == "32"][few]
    if dropout and family == "cdna3" and width != "32" and not few:
        tile = _GEMM_CDNA3_DROPOUT
    return replace(tile, block_r=_expand_rank(width, rank))


def has_tma(family: Family, width: Width) -> bool:
    """Whether `gemm_expand_tma` has tiles: 16-bit x, and a GPU with a tensor memory accelerator."""
    return family in _GEMM_TMA and width != "32"


def gemm_tma_tile(family: Family, width: Width, m: int, rank: int, *, dropout: bool) -> Tile:
    """Tile of `gemm_expand_tma`."""
    few = m <= FEW_ROWS
    tile = _GEMM_TMA_DROPOUT if dropout and not few else _GEMM_TMA[family][few]
    # 64 columns of rank at 128 x 256 spill 8 B a thread under Triton 3.6, though not under 3.7.
    return replace(tile, block_r=min(_expand_rank(width, rank), 32))


def shrink_tile(family: Family, width: Width, rank: int) -> Tile:
    """Tile of `shrink`: x streams through once per 64 columns of rank (32 in fp32)."""
    if width == "32":
        return Tile(block_m=32, block_k=32, block_r=min(padded_rank(rank), 32))
    block_k = 128 if width == "16" and family != "cdna3" else 64
    stages = 2 if family == "cdna3" else 3
    # tf32x3 keeps a second accumulator: 64 columns of it spill where the products are mma.sync.
    widest = 32 if width == "mixed" and family in ("ampere", "ada") else 64
    if width == "mixed" and family in ("ampere", "ada", "blackwell"):
        block_k = 32
    return Tile(block_m=64, block_k=block_k, block_r=min(padded_rank(rank), widest), num_stages=stages)


def one_pass_tile(family: Family, width: Width, m: int, rank: int) -> Tile:
    """Tile of `one_pass`: block_r is the whole rank, up to ONE_PASS_RANK."""
    block_r = padded_rank(rank)
    few = m <= SMALLEST_DOT
    nvidia = family != "cdna3"
    stages = 2 if family in ("ada", "cdna3") or (family == "ampere" and block_r == 64 and few) else 3
    if width == "32":
        tile = _tile(16, 32, 16, 4, 3 if nvidia and block_r == SMALLEST_DOT else 2)
    elif width == "mixed":
        tile = _tile(16 if few else 32, 32, 32, 4, stages)
    elif block_r <= 64:
        # A row of tiles is one stream of the weight: deeper where shared memory is left over.
        large = family in ("hopper", "blackwell")
        tile = _tile(16 if few else 64, 64, 128 if large else 64, 4, 5 if large and few and block_r <= 32 else stages)
    else:
        deep = 4 if family == "blackwell" and not few else stages  # with three, its shares spill 8 B under Triton 3.7
        tile = _tile(16 if few else 64, 64, 32 if family == "cdna3" else 64, 8, deep)
    return replace(tile, block_r=block_r)


def one_pass_sum_tile(width: Width, rank: int) -> Tile:
    """Tile of the second launch of `one_pass` with several splits: small, as there is little to share out."""
    block_r = padded_rank(rank)
    warps = 8 if block_r >= 64 else 4  # several loads in flight spill at these ranks over four warps
    return Tile(
        block_m=SMALLEST_DOT, block_n=64 if width == "16" else 32, block_r=block_r, num_warps=warps, num_stages=1
    )


def bwd_lora_b_tile(family: Family, width: Width, rank: int) -> Tile:
    """Tile of `bwd_lora_b`: one column tile of dy a program, its rows in steps of block_m."""
    if width == "32":
        return Tile(block_m=32, block_n=64, block_r=SMALLEST_DOT)
    if family == "cdna3":  # wider ranks spill scalar registers at any size tried
        return Tile(block_m=32, block_n=64, block_r=min(padded_rank(rank), 32 if width == "16" else 16))
    if family == "blackwell":
        return Tile(block_m=64, block_n=64, block_r=min(padded_rank(rank), 64 if width == "16" else 16))
    block_r = min(padded_rank(rank), 64 if width == "16" else 32)
    # Two accumulators of 64 columns spill over four warps on sm_80; on sm_89 two of 16 columns do, too.
    warps = 8 if block_r == 64 or family == "ada" else 4
    return Tile(block_m=64, block_n=128 if width == "16" else 64, block_r=block_r, num_warps=warps, num_stages=3)


def bwd_lora_a_tile(family: Family, width: Width, rank: int) -> Tile:
    """Tile of `bwd_lora_a`: one column tile of x a program, its rows in steps of block_m."""
    if width == "32":
        return Tile(block_m=32, block_k=64, block_r=SMALLEST_DOT)
    block_r = min(padded_rank(rank), 64 if width == "16" else 32)
    return Tile(
        block_m=64, block_k=128 if width == "16" else 64, block_r=block_r, num_stages=2 if family == "cdna3" else 3
    )


def bwd_dx_lora_a_tile(family: Family, width: Width, rank: int) -> Tile:
    """Tile of `bwd_dx_lora_a`: half of `bwd_lora_a`'s, as the mask lives until both products have used it."""
    block_r = padded_rank(rank)
    if family == "cdna3":  # masks are scalar registers, which larger tiles spill
        return Tile(
            block_m=32, block_k=32, block_r=min(block_r, 16 if width == "32" else 32), num_warps=8, num_stages=1
        )
    if width == "32":
        return Tile(block_m=32, block_k=64, block_r=SMALLEST_DOT)
    if width == "16":
        return Tile(block_m=64, block_k=64, block_r=min(block_r, 64))
    # tf32x3 keeps a second accumulator; several rank tiles beside it spill but in the smallest.
    if block_r <= 32:
        return Tile(block_m=64 if block_r == SMALLEST_DOT else 32, block_k=64, block_r=block_r)
    if block_r == 64 and family in ("hopper", "blackwell"):
        return Tile(block_m=32, block_k=64, block_r=64, num_warps=8)
    return Tile(block_m=32, block_k=32 if family == "blackwell" else 64, block_r=SMALLEST_DOT, num_stages=1)


@dataclass(frozen=True)
class ShippedTile:
    """One entry of the table as the compile-only tests and `lora-kernels info` see it."""

    kernel: str
    family: Family
    width: Width
    dropout: bool
    tile: Tile


def shipped_tiles(family: Family) -> Iterator[ShippedTile]:
    """Every tile that any problem on this family can be given, each once."""
    seen: set[ShippedTile] = set()
    for width in WIDTHS:
        for dropout in (False, True):
            for rank in (1 << i for i in range(4, 10)):
                for kernel, tile in _tiles_of(family, width, rank, dropout=dropout):
                    entry = ShippedTile(kernel, family, width, dropout, tile)
                    if entry not in seen:
                        seen.add(entry)
                        yield entry


def _tiles_of(family: Family, width: Width, rank: int, *, dropout: bool) -> Iterator[tuple[str, Tile]]:
    yield "shrink", shrink_tile(family, width, rank)
    yield "bwd_lora_a", bwd_lora_a_tile(family, width, rank)
    if dropout:
        yield "bwd_dx_lora_a", bwd_dx_lora_a_tile(family, width, rank)
    else:  # dy is never masked
        yield "bwd_lora_b", bwd_lora_b_tile(family, width, rank)
    for m in (SMALLEST_DOT, FEW_ROWS, 1 << 13):
        yield "gemm_expand", gemm_tile(family, width, m, rank, dropout=dropout)
        if has_tma(family, width):
            yield "gemm_expand_tma", gemm_tma_tile(family, width, m, rank, dropout=dropout)
        if rank <= ONE_PASS_RANK[width]:
            yield "one_pass", one_pass_tile(family, width, m, rank)
    if not dropout and rank <= ONE_PASS_RANK[width]:  # the mask is applied before the shares are stored
        yield "one_pass_sum", one_pass_sum_tile(width, rank)
