"""The persistent Gluon GEMM for sm_90: its machine code has what it is written for, and takes no more than there is."""

import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_kernels.kernels import persistent
from lora_kernels.planning.tiles import Tile, tile_of
from tests.compile.oldest import oldest_triton
from tests.compile.support import Figures, kept_figures


def persistent_tile(n: int, rank: int) -> Tile:
    tile = tile_of("hopper", "16", "persistent", columns=n, rank=rank)
    assert tile is not None
    return tile


LAYOUT = "NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)"
TILES = {
    f"{'wide' if columns == 4096 else 'narrow'}-r{rank}": persistent_tile(columns, rank)
    for columns in (4096, 64)
    for rank in (16, 32, 64)
}
VARIANTS = {
    "forward": {"RHS_IS_NK": True, "HAS_BIAS": False},
    "forward-bias": {"RHS_IS_NK": True, "HAS_BIAS": True},
    "dx": {"RHS_IS_NK": False, "HAS_BIAS": False},
    "dx-bias": {"RHS_IS_NK": False, "HAS_BIAS": True},  # nobody's yet; the kernel allows it
}


@functools.cache
def figures_of(dtype: str, tile: Tile, variant: str, version: str | None = None) -> Figures:
    flags = VARIANTS[variant]
    rhs_block = [tile.block_n, tile.block_k] if flags["RHS_IS_NK"] else [tile.block_k, tile.block_n]
    blocks = {
        "lhs_desc": [tile.block_m, tile.block_k], "rhs_desc": rhs_block, "s_desc": [tile.block_m, tile.block_k],
        "e_desc": rhs_block, "out_desc": [tile.block_m // 2, persistent.CHUNK.value],
    }  # fmt: skip
    signature = {name: f"tensordesc<{dtype}{block},{LAYOUT}>" for name, block in blocks.items()}
    signature |= dict.fromkeys(("M", "N", "K", "R"), "i32") | {"gain": "fp32"}
    known = flags | {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "BLOCK_R": tile.block_r,
        "GROUP_M": tile.group_m, "STAGES": tile.num_stages,
    }  # fmt: skip
    if flags["HAS_BIAS"]:
        signature["bias_ptr"] = f"*{dtype}"
    else:
        known["bias_ptr"] = None
    aligned = {"bias_ptr"} & signature.keys()
    return kept_figures(
        persistent.persistent_kernel, signature, known, "sm_90", tile.num_warps, tile.num_stages, aligned,
        version=version,
    )  # fmt: skip


def cases() -> Iterator[object]:
    for name, tile in TILES.items():
        for variant in VARIANTS:
            for dtype in ("bf16", "fp16"):
                yield pytest.param(dtype, tile, variant, id=f"{name}-{variant}-{dtype}")


@pytest.mark.parametrize(("dtype", "tile", "variant"), list(cases()))
def test_the_oldest_triton_finds_no_faults_either(dtype: str, tile: Tile, variant: str) -> None:
    assert figures_of(dtype, tile, variant, oldest_triton()).faults() == []


@pytest.mark.parametrize(("dtype", "tile", "variant"), list(cases()))
def test_machine_code(dtype: str, tile: Tile, variant: str) -> None:
    figures = figures_of(dtype, tile, variant)
    assert figures.faults() == []
    assert figures.registers == 168  # of 384 threads at the start, all that a multiprocessor has
    opcodes = figures.opcodes
    assert opcodes["STL"] == opcodes["LDL"] == 0
    # Each consumer: a step of the main loop and one of the expand, trimmed, in products of 16 columns.
    assert opcodes["HGMMA"] == 2 * (tile.block_k + tile.block_r) // 16
    product = f"HGMMA.64x{tile.block_n}x16.F32" + (".BF16" if dtype == "bf16" else "")
    assert figures.sass.count(product + " ") == opcodes["HGMMA"]
    # rhs along n comes in boxes of 64 columns, the widest that are swizzled.
    loads_of_rhs = 1 if VARIANTS[variant]["RHS_IS_NK"] else tile.block_n // 64
    assert opcodes["UTMALDG"] == 2 * (1 + loads_of_rhs)
    assert opcodes["UTMASTG"] == 2 * tile.block_n // 64
    assert opcodes["STSM"] >= opcodes["UTMASTG"]


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_registers_move_from_the_loader_to_the_consumers(tile: Tile) -> None:
    """What is asked for together is never more than 3 x 168, or the last to ask would wait for ever."""
    sass = figures_of("bf16", tile, "forward-bias").sass
    asked = {int(n, 16) for n in re.findall(r"USETMAXREG\.\w+\.CTAPOOL (?:UP\d, )?(0x[0-9a-f]+)", sass)}
    consumers, loader = persistent.CONSUMER_REGISTERS.value, persistent.LOADER_REGISTERS.value
    assert {consumers, loader} <= asked
    assert 2 * consumers + loader == 3 * 168
    # Before and after the partitions Triton's own code runs in the first warpgroup, beside two that wait.
    first, waiting = max(asked), min(asked - {loader})
    assert first + 2 * waiting <= 3 * 168


def test_the_page_of_its_design_tells_its_shared_memory() -> None:
    page = (Path(__file__).parents[2] / "docs" / "design" / "persistent.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"^\| shared memory.*", page, re.MULTILINE)
    told = [int(n.replace(",", "")) for n in re.findall(r"[\d,]+(?= B)", row)]
    wide, bias, most, *narrow = told
    assert most == 232448
    for tile, figures in ("wide-r64", (wide, bias)), ("narrow-r32", tuple(narrow)):
        shared = [figures_of("bf16", TILES[tile], variant).shared_bytes for variant in ("forward", "forward-bias")]
        assert shared == list(figures)


def test_a_product_waits_for_nothing_but_its_operands() -> None:
    """Accumulators moved or set to zero between the products of a step would show as instructions in between."""
    sass = figures_of("bf16", TILES["wide-r64"], "forward-bias").sass
    steps = re.findall(r"WARPGROUP\.ARRIVE(.*?)WARPGROUP\.DEPBAR", sass, re.DOTALL)
    assert len(steps) == 4  # the main loop and the expand, of two consumers
    for step in steps:
        assert step.count("HGMMA") == 4
        assert step.count("\n") < 80


# What the arguments of docs/design/persistent.md find in the machine code: a letter for each instruction that matters.
LETTERS = {
    r"WARPGROUP\.DEPBAR": "w",  # wait for products
    r"SYNCS\.ARRIVE\S*\.A1T0": "a",  # a slot goes back
    r"BAR\.SYNC\S* 0x[02], 0x80": "b",  # of one warpgroup
    r"STSM\.16\.M88\.4": "s",  # a chunk is written
    r"FENCE\.VIEW\.ASYNC": "f",
    r"UTMASTG": "t",  # and stored
    r" DEPBAR\.LE SB0, 0x1": "r",  # the store before last has read its chunk
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_barriers_stand_where_the_argument_needs_them(variant: str) -> None:
    sass = figures_of("bf16", TILES["wide-r16"], variant).sass
    found = (next((a for p, a in LETTERS.items() if re.search(p, line)), "") for line in sass.splitlines())
    order = "".join(found)
    # Three times in each consumer - main loop, expand, end of a tile - all warps wait, then one arrives.
    assert len(re.findall("wb+a", order)) == order.count("a") == order.count("w") == 6
    # Four chunks of each consumer: the old store has read, all know, all write and fence, all have, one stores.
    assert len(re.findall("rb+s+fb+t", order)) == order.count("t") == order.count("r") == 8


def test_nothing_is_missing_from_a_supported_triton() -> None:
    # Else the kernel would quietly be plain Python, and every other test of it would say so in its own way.
    assert persistent.MISSING == ""
    assert persistent.persistent_available()
