"""The shipped tiles: for each kernel and family of GPUs, block sizes that fit registers and shared memory.

Set from compile-only figures (tests/compile holds every entry to: no spills, shared memory within the family's limit), not
yet from measured speed. A family is a shared-memory limit and a matrix unit:

    hopper  sm_90, sm_100        227 KiB, wgmma / tcgen05, TMA
    ampere  sm_80                163 KiB, mma.sync
    ada     sm_86, sm_89, sm_120  99 KiB, mma.sync; also what an unknown NVIDIA GPU gets
    cdna3   gfx942                64 KiB, mfma; also what an unknown AMD GPU gets
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

Family = Literal["hopper", "ampere", "ada", "cdna3"]
Width = Literal["16", "mixed", "32"]
"""Bits of x and adapters: both 16, adapters fp32 over a 16-bit x, both fp32."""

FAMILIES: tuple[Family, ...] = ("hopper", "ampere", "ada", "cdna3")
WIDTHS: tuple[Width, ...] = ("16", "mixed", "32")
FAMILY_OF_ARCH: dict[str, Family] = {
    "sm_80": "ampere",
    "sm_86": "ada",
    "sm_89": "ada",
    "sm_90": "hopper",
    "sm_100": "hopper",
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


# GEMM with the expand folded in, at training M and at a few dozen rows.
_GEMM: dict[tuple[Family, Width], tuple[Tile, Tile]] = {
    ("hopper", "16"): (_tile(128, 256, 64, 8, 3), _tile(64, 64, 128, 4, 3)),
    ("ampere", "16"): (_tile(128, 128, 64, 8, 3), _tile(64, 64, 64, 4, 3)),
    ("ada", "16"): (_tile(128, 128, 32, 8, 3), _tile(64, 64, 64, 4, 3)),
    ("cdna3", "16"): (_tile(128, 128, 32, 8, 2), _tile(64, 64, 64, 4, 2)),
    ("hopper", "32"): (_tile(64, 64, 32, 8, 3), _tile(64, 32, 32, 4, 3)),
    ("ampere", "32"): (_tile(64, 64, 32, 8, 3), _tile(64, 32, 32, 4, 3)),
    ("ada", "32"): (_tile(64, 64, 32, 8, 3), _tile(64, 32, 32, 4, 3)),
    ("cdna3", "32"): (_tile(64, 64, 32, 8, 2), _tile(64, 32, 32, 4, 2)),
}
# The dropout mask and a second accumulator live in the epilogue of dx: half the tile.
_GEMM_DROPOUT: dict[tuple[Family, Width], Tile] = {
    ("hopper", "16"): _tile(128, 128, 64, 8, 3),
    ("ampere", "16"): _tile(128, 128, 64, 8, 3),
    ("ada", "16"): _tile(128, 128, 32, 8, 3),
    ("cdna3", "16"): _tile(64, 128, 32, 8, 2),
    ("hopper", "32"): _tile(64, 64, 32, 8, 3),
    ("ampere", "32"): _tile(64, 64, 32, 8, 3),
    ("ada", "32"): _tile(64, 64, 32, 8, 3),
    ("cdna3", "32"): _tile(64, 64, 32, 8, 2),
}
FEW_ROWS = 64
"""Up to this M the tall GEMM tile would be mostly padding."""


def padded_rank(rank: int) -> int:
    """The rank a tile computes: the next power of two, at least what the matrix unit multiplies."""
    return max(SMALLEST_DOT, 1 << (rank - 1).bit_length())


def gemm_tile(family: Family, width: Width, m: int, rank: int, *, dropout: bool) -> Tile:
    """Tile of `gemm_expand` and `gemm_expand_tma`; the expand walks the rank in steps of at most 64 (32 in fp32)."""
    base: Width = "32" if width == "32" else "16"
    if dropout:
        tile = _GEMM_DROPOUT[family, base]
    else:
        tile = _GEMM[family, base][m <= FEW_ROWS]
    return replace(tile, block_r=min(padded_rank(rank), 64 if width == "16" else 32))


def shrink_tile(family: Family, width: Width, rank: int) -> Tile:
    """Tile of `shrink`: x streams through once per 64 columns of rank."""
    block_k = 128 if width == "16" and family != "cdna3" else 64
    stages = 2 if family == "cdna3" else 3
    block_m = 64 if width != "32" else 32
    return Tile(
        block_m=block_m, block_k=block_k if width != "32" else 32, block_r=min(padded_rank(rank), 64), num_stages=stages
    )


def one_pass_tile(family: Family, width: Width, m: int, rank: int) -> Tile:
    """Tile of `one_pass`: block_r is the whole rank, and the others shrink as it grows."""
    block_r = padded_rank(rank)
    few = m <= SMALLEST_DOT
    stages = 2 if family in ("ada", "cdna3") else 3
    if width == "16":
        if block_r <= 64:
            tile = _tile(16 if few else 64, 64, 64 if family == "cdna3" else 128, 4, stages)
        elif block_r <= 128:
            tile = _tile(16 if few else 64, 64, 32 if family == "cdna3" else 64, 8, stages)
        else:
            tile = _tile(16, 64, 32, 8, stages)
    elif block_r <= 64:
        tile = _tile(16 if few else 32, 32, 32, 4, stages)
    else:
        tile = _tile(16, 32, 16, 8, 2)
    return replace(tile, block_r=block_r)


def bwd_lora_b_tile(family: Family, width: Width, rank: int) -> Tile:
    """Tile of `bwd_lora_b`: one column tile of dy a program, its rows in steps of block_m."""
    block_r = min(padded_rank(rank), 64 if width == "16" else 32)
    stages = 2 if family == "cdna3" or width == "32" else 3
    return Tile(block_m=64, block_n=128 if width == "16" else 64, block_r=block_r, num_stages=stages)


def bwd_lora_a_tile(family: Family, width: Width, rank: int) -> Tile:
    """Tile of `bwd_lora_a`: one column tile of x a program, its rows in steps of block_m."""
    block_r = min(padded_rank(rank), 64 if width == "16" else 32)
    stages = 2 if family == "cdna3" or width == "32" else 3
    return Tile(block_m=64, block_k=128 if width == "16" else 64, block_r=block_r, num_stages=stages)


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
    ranks = [1 << i for i in range(4, 10)]
    seen: set[ShippedTile] = set()
    for width in WIDTHS:
        for dropout in (False, True):
            for rank in ranks:
                candidates = [
                    ("shrink", shrink_tile(family, width, rank)),
                    ("bwd_lora_a", bwd_lora_a_tile(family, width, rank)),
                ]
                if not dropout:
                    candidates.append(("bwd_lora_b", bwd_lora_b_tile(family, width, rank)))
                for m in (SMALLEST_DOT, FEW_ROWS, 1 << 13):
                    candidates.append(("gemm_expand", gemm_tile(family, width, m, rank, dropout=dropout)))
                    candidates.append(("one_pass", one_pass_tile(family, width, m, rank)))
                    if family == "hopper":
                        candidates.append(("gemm_expand_tma", gemm_tile(family, width, m, rank, dropout=dropout)))
                for kernel, tile in candidates:
                    entry = ShippedTile(kernel, family, width, dropout, tile)
                    if entry not in seen:
                        seen.add(entry)
                        yield entry
