"""The shipped tiles: for each kernel and family of GPUs, block sizes that fit registers and shared memory.

One JSON file a family in `tables/`, with the rates of the cost model and the reasons for what is unlike its
neighbours. Of a kernel's entries for a width the first that the problem does not exceed counts: `rows` (M), `columns`
(N of the product), `rank`; a limit that is absent is none. A kernel name ending in `_dropout` is the variant that
applies a mask to its output. `variants` are what tuning tries besides.

    blackwell  sm_100               227 KiB and 512 columns of tensor memory, tcgen05, TMA
    hopper     sm_90                227 KiB, wgmma, TMA
    ampere     sm_80                163 KiB, mma.sync
    ada        sm_86, sm_89, sm_120  99 KiB, mma.sync; also what an unknown NVIDIA GPU gets
    cdna3      gfx942                64 KiB, mfma; also what an unknown AMD GPU gets
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

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
NO_LIMIT = 1 << 62
DROPOUT = "_dropout"
MASKS_ITS_INPUT = ("shrink", "one_pass", "bwd_lora_a")
"""Kernels whose one tile serves with a mask and without."""


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


@dataclass(frozen=True)
class Entry:
    """A tile and the largest problem that gets it."""

    tile: Tile
    rows: int = NO_LIMIT
    columns: int = NO_LIMIT
    rank: int = MAX_RANK


@dataclass(frozen=True)
class Rates:
    """A data sheet's rates, dense: TFLOP/s by width of the base product, TB/s of the memory.

    Attributes:
        device: part of the name of the GPUs that it is for.
        gemm: measured on such a GPU: the rates of our GEMMs over the library's, by the names of `cost.GEMM`.
    """

    data_sheet: str
    tflops_16: float
    tflops_32: float
    tbytes: float
    device: str = ""
    gemm: Mapping[str, float] = field(default_factory=dict)


Entries = Mapping[str, Mapping[str, tuple[Entry, ...]]]
"""By kernel and width."""


@dataclass(frozen=True)
class Table:
    """What one family's file says."""

    rates: tuple[Rates, ...]
    tiles: Entries
    variants: Entries


@cache
def table_of(family: Family) -> Table:
    """The family's table, read once."""
    content = json.loads((Path(__file__).parent / "tables" / f"{family}.json").read_text(encoding="utf-8"))
    rates = tuple(Rates(**rates) for rates in content["rates"])
    return Table(rates, _entries(content["tiles"]), _entries(content.get("variants", {})))


def rates_of(family: Family, device: str) -> Rates:
    """The rates for a GPU of this name; an unknown one has the family's first."""
    rates = table_of(family).rates
    return next((one for one in rates if one.device and one.device in device), rates[0])


def _entries(found: Mapping[str, Mapping[str, list[dict[str, int]]]]) -> Entries:
    def entry(fields: dict[str, Any]) -> Entry:
        limits = {name: fields.pop(name) for name in ("rows", "columns", "rank") if name in fields}
        return Entry(Tile(**fields), **limits)

    return {
        kernel: {width: tuple(entry(dict(fields)) for fields in rows) for width, rows in widths.items()}
        for kernel, widths in found.items()
    }


def tile_of(
    family: Family, width: Width, kernel: str, *, rows: int = 0, columns: int = 0, rank: int = 1
) -> Tile | None:
    """The tile of a kernel for a problem of this size; None where the family has none."""
    for entry in table_of(family).tiles.get(kernel, {}).get(width, ()):
        if rows <= entry.rows and columns <= entry.columns and rank <= entry.rank:
            return entry.tile
    return None


def fewest_programs(count: int, sm_count: int) -> int:
    """Programs of a persistent kernel that take so many tiles in the fewest waves, one at most on a multiprocessor.

    1024 tiles take an H200 350 us on 128 of its 132 multiprocessors, and 355 on all (`bench.kernels`).
    """
    waves = -(-count // sm_count)
    return -(-count // waves)


def dyb_columns(family: Family, width: Width, *, rank: int, itemsize: int) -> int | None:
    """Columns of dy for each share of dyb that dB's kernel leaves on its way; None: dy is read a second time for dyb.

    Each tile of so many columns has rank fp32 shares a row, written and read again, where a second look reads the tile,
    in elements of itemsize bytes: the fewer bytes win. A rank of several tiles is read for each of them anyway.
    """
    tile = tile_of(family, width, "bwd_lora_b", rank=rank)
    if tile is None or rank > tile.block_r or 2 * 4 * rank > tile.block_n * itemsize:
        return None
    return tile.block_n


def kernels_of(family: Family, width: Width) -> list[str]:
    """The kernels that have tiles for this width."""
    return [kernel for kernel, widths in table_of(family).tiles.items() if width in widths]


def variants(family: Family, width: Width, kernel: str, *, rows: int, rank: int) -> tuple[Tile, ...]:
    """Other tiles of a kernel that tuning tries beside the planned one."""
    entries = table_of(family).variants.get(kernel, {}).get(width, ())
    return tuple(entry.tile for entry in entries if rows <= entry.rows and rank <= entry.rank)


def padded_rank(rank: int) -> int:
    """The rank a tile computes: the next power of two, at least what the matrix unit multiplies."""
    return max(SMALLEST_DOT, 1 << (rank - 1).bit_length())


@dataclass(frozen=True)
class ShippedTile:
    """One entry of the table as the compile-only tests see it."""

    kernel: str
    family: Family
    width: Width
    dropout: bool
    tile: Tile


def shipped_tiles(family: Family) -> Iterator[ShippedTile]:
    """Every tile that any problem on this family can be given, and every variant, each once."""
    table, seen = table_of(family), set[ShippedTile]()
    for source in (table.tiles, table.variants):
        for kernel, widths in source.items():
            masks = (False, True) if kernel in MASKS_ITS_INPUT else (kernel.endswith(DROPOUT),)
            for width in WIDTHS:
                for entry in widths.get(width, ()):
                    for dropout in masks:
                        shipped = ShippedTile(kernel.removesuffix(DROPOUT), family, width, dropout, entry.tile)
                        if shipped not in seen:
                            seen.add(shipped)
                            yield shipped
