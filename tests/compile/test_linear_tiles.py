"""Every shipped tile of every kernel, compiled for every GPU it can be chosen for: no spills, shared memory within
limits."""

import re
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest

from lora_kernels.kernels.bwd_dx_lora_a import bwd_dx_lora_a_kernel
from lora_kernels.kernels.bwd_lora_a import bwd_lora_a_kernel
from lora_kernels.kernels.bwd_lora_b import bwd_lora_b_kernel
from lora_kernels.kernels.expand import expand_kernel
from lora_kernels.kernels.gemm_expand import gemm_expand_kernel
from lora_kernels.kernels.gemm_expand_tma import gemm_expand_tma_kernel
from lora_kernels.kernels.in_parts import BLOCK as PARTS_BLOCK, in_parts_kernel
from lora_kernels.kernels.one_pass import one_pass_kernel, one_pass_sum_kernel
from lora_kernels.kernels.reduce_partials import BLOCK, MOST, STAGES, reduce_partials_kernel
from lora_kernels.kernels.shrink import shrink_kernel
from lora_kernels.planning.plan import WARPS_PER_SM
from lora_kernels.planning.tiles import (
    FAMILY_OF_ARCH,
    MAX_RANK,
    WIDTHS,
    ShippedTile,
    Width,
    shipped_tiles,
    tile_of,
)
from tests.compile.oldest import oldest_triton
from tests.compile.support import TARGETS, Figures, kept_figures

KERNELS = {
    "shrink": shrink_kernel,
    "one_pass": one_pass_kernel,
    "one_pass_sum": one_pass_sum_kernel,
    "gemm_expand": gemm_expand_kernel,
    "gemm_expand_tma": gemm_expand_tma_kernel,
    "bwd_lora_a": bwd_lora_a_kernel,
    "bwd_dx_lora_a": bwd_dx_lora_a_kernel,
    "bwd_lora_b": bwd_lora_b_kernel,
    "expand": expand_kernel,
}
# A partial sum is fp32 whatever the inputs; the rest is the problem's dtype or its adapters'.
PARTIALS = {
    "one_pass_sum": ("y_shares_ptr", "xa_shares_ptr"),
    "bwd_lora_a": ("d_a_ptr",),
    "bwd_dx_lora_a": ("d_a_ptr",),
    "bwd_lora_b": ("dyb_ptr", "d_b_ptr", "d_bias_ptr"),
}
# A bias may have either dtype: the wider is compiled.
OF_ADAPTERS = {"a_ptr", "b_ptr", "s_ptr", "e_ptr", "xa_ptr", "dyb_ptr", "bias_ptr"}


class Variant(NamedTuple):
    """How a launch specialises the kernel besides its tile: which strides are 1, which flags are set."""

    unit_strides: tuple[str, ...]
    flags: dict[str, bool]


def variants(shipped: ShippedTile) -> list[Variant]:
    """The launches that contiguous tensors give: forward and backward read the weight along different axes."""
    dropout = {"HAS_DROPOUT": shipped.dropout, "HAS_OFFSET": False}
    forward, backward = ("stride_lhs_k", "stride_rhs_k", "stride_e_r"), ("stride_lhs_k", "stride_rhs_n", "stride_e_n")
    match shipped.kernel:
        case "shrink":
            return [
                Variant(("stride_x_k", "stride_a_k"), dropout | {"IS_PARTIAL": False, "LAUNCHES_DEPENDENTS": False})
            ]
        case "one_pass":
            unit = ("stride_x_k", "stride_w_k", "stride_a_k", "stride_b_r")
            return [
                Variant(unit, dropout | {"HAS_BIAS": True, "IS_PARTIAL": False}),
                Variant(unit, dropout | {"HAS_BIAS": False, "IS_PARTIAL": True}),
            ]
        case "one_pass_sum":
            return [Variant(("stride_b_r",), {"HAS_BIAS": True})]
        case "gemm_expand":
            dx = Variant(backward, dropout | {"HAS_BIAS": False})
            return [dx] if shipped.dropout else [dx, Variant(forward, dropout | {"HAS_BIAS": True})]
        case "gemm_expand_tma":
            dx = Variant(("stride_e_n",), dropout | {"HAS_BIAS": False, "RHS_IS_NK": False, "USE_PDL": False})
            forward_flags = dropout | {"HAS_BIAS": True, "RHS_IS_NK": True, "USE_PDL": True}
            return [dx] if shipped.dropout else [dx, Variant(("stride_e_r",), forward_flags)]
        case "bwd_lora_a":
            return [Variant(("stride_x_k",), dropout)]
        case "bwd_dx_lora_a":
            unit = ("stride_x_k", "stride_a_k")
            of_rank = partial(tile_of, shipped.family, shipped.width, "bwd_dx_lora_a_dropout")
            # One rank tile holds the ranks it was made for; the tile of the highest rank serves in several.
            one, several = (of_rank(rank=rank) == shipped.tile for rank in (shipped.tile.block_r, MAX_RANK))
            return [
                Variant(unit, {"HAS_OFFSET": False, "NEEDS_D_A": True, "ONE_RANK_TILE": flag})
                for flag, used in ((True, one), (False, several))
                if used
            ]
        case "bwd_lora_b":
            flags = {"NEEDS_DYB": True, "NEEDS_D_B": True, "NEEDS_D_BIAS": True}
            return [Variant(("stride_dy_n", "stride_b_r"), flags)]
        case "expand":
            return [
                Variant(("stride_base_n", "stride_e_r"), {"HAS_BASE": True, "HAS_BIAS": False}),
                Variant(("stride_base_n", "stride_e_n"), {"HAS_BASE": False, "HAS_BIAS": False}),
                # Onto the library's product, which only fp32 adapters need.
                *[
                    Variant(("stride_base_n", stride), {"HAS_BASE": True, "HAS_BIAS": bias})
                    for stride, bias in (("stride_e_r", True), ("stride_e_n", False))
                    if shipped.width == "mixed"
                ],
            ]
    raise AssertionError(shipped.kernel)


def figures_of(
    shipped: ShippedTile,
    variant: Variant,
    target: str,
    dtypes: tuple[str, str] | None = None,
    *,
    rank_by_16: bool = False,
    tf32: bool = False,
    version: str | None = None,
) -> Figures:
    """dtypes: of the large tensors and of the adapters; None: those that the tile's width is named for.

    rank_by_16: as for a rank of 16, 32, ..., whose rows are copied asynchronously; else as for any, which takes more
    registers. tf32: as where the user lets torch multiply fp32 in it. version: of Triton, as in `kept_figures`.
    """
    kernel, tile = KERNELS[shipped.kernel], shipped.tile
    if dtypes is None:
        dtypes = {"16": ("bf16", "bf16"), "mixed": ("bf16", "fp32"), "32": ("fp32", "fp32")}[shipped.width]
    dtype, adapter = dtypes
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "BLOCK_R": tile.block_r}
    known: dict[str, Any] = blocks | variant.flags | dict.fromkeys(variant.unit_strides, 1) | {"GROUP_M": tile.group_m}
    mixed = "ieee" if target.startswith("gfx") else "tf32x3"
    known["PRECISION"] = mixed if shipped.width == "mixed" else "tf32" if tf32 else "ieee"
    if not variant.flags.get("HAS_DROPOUT", True):
        known["seed_ptr"] = None
    if not variant.flags.get("HAS_BIAS", True):
        known["bias_ptr"] = None
    if not variant.flags.get("HAS_BASE", True):
        known["base_ptr"] = None
    rhs_block = [tile.block_n, tile.block_k] if variant.flags.get("RHS_IS_NK") else [tile.block_k, tile.block_n]
    types = {
        "lhs_desc": f"tensordesc<{dtype}{[tile.block_m, tile.block_k]}>",
        "rhs_desc": f"tensordesc<{dtype}{rhs_block}>",
        "out_desc": f"tensordesc<{dtype}{[tile.block_m, tile.block_n]}>",
        "seed_ptr": "*i64",
        "scale": "fp32",
        "gain": "fp32",
    }
    signature, constexprs, aligned = {}, {}, set()
    unaligned = {"threshold", "splits", "M"} | (set() if rank_by_16 else {"R"})
    for name in kernel.arg_names:
        if name in known:
            constexprs[name] = known[name]
            continue
        if name in types:
            signature[name] = types[name]
        elif name.endswith("_ptr"):
            is_share = name in PARTIALS.get(shipped.kernel, ())
            is_share |= variant.flags.get("IS_PARTIAL", False) and name in ("y_ptr", "xa_ptr")
            signature[name] = "*fp32" if is_share else "*" + (adapter if name in OF_ADAPTERS else dtype)
        else:
            signature[name] = "i32"
        if name.endswith("_ptr") or (signature[name] == "i32" and name not in unaligned):
            aligned.add(name)
    return kept_figures(
        kernel, signature, constexprs, target, tile.num_warps, tile.num_stages, aligned, version=version
    )


def cases() -> Iterator[Any]:
    for target in TARGETS:
        for shipped in shipped_tiles(FAMILY_OF_ARCH[target]):
            if shipped.kernel == "persistent":  # test_persistent.py
                continue
            tile = shipped.tile
            sizes = f"{tile.block_m}x{tile.block_n}x{tile.block_k}r{tile.block_r}w{tile.num_warps}s{tile.num_stages}"
            mask = "-dropout" if shipped.dropout else ""
            yield pytest.param(shipped, target, id=f"{target}-{shipped.kernel}-{shipped.width}{mask}-{sizes}")


@pytest.mark.parametrize(("shipped", "target"), list(cases()))
def test_a_shipped_tile_has_no_faults(shipped: ShippedTile, target: str) -> None:
    for variant in variants(shipped):
        figures = figures_of(shipped, variant, target)
        assert figures.faults() == [], f"{variant}: {figures}"
        # x is a shard: its place in the whole input takes two registers more. One family of each vendor stands for all.
        if shipped.dropout and target in ("sm_90", "gfx942"):
            figures = figures_of(shipped, Variant(variant.unit_strides, variant.flags | {"HAS_OFFSET": True}), target)
            assert figures.faults() == [], f"{variant} of a shard: {figures}"


FP16 = {"16": ("fp16", "fp16"), "mixed": ("fp16", "fp32")}
BF16 = {"16": ("bf16", "bf16"), "mixed": ("bf16", "fp32")}


@pytest.mark.parametrize(("shipped", "target"), [c for c in cases() if c.values[0].width in FP16])
def test_a_tile_has_no_faults_in_fp16(shipped: ShippedTile, target: str) -> None:
    # Not bf16 by another name: an expand has a gain, and fp32 adapters are cut in other parts.
    for variant in variants(shipped):
        figures = figures_of(shipped, variant, target, FP16[shipped.width])
        assert figures.faults() == [], f"{variant}: {figures}"


def hopper_cases() -> Iterator[Any]:
    for case in cases():
        shipped, target = case.values
        if target == "sm_90":
            for dtype in ("bf16", "fp16") if shipped.width in FP16 else ("fp32", "tf32"):
                yield pytest.param(shipped, dtype, id=f"{case.id}-{dtype}")


@pytest.mark.parametrize("version", [None, oldest_triton()])
@pytest.mark.parametrize(("shipped", "dtype"), list(hopper_cases()))
def test_no_register_of_a_product_in_flight_is_used(shipped: ShippedTile, dtype: str, version: str | None) -> None:
    # Whole rows of x or a shard's, and ranks of 16, 32, ... or any. tests/compile/hazards.py says what is looked for;
    # faults() has it among spills and shared memory, which are asked of the oldest Triton, too.
    dtypes = {"bf16": BF16, "fp16": FP16}.get(dtype, {}).get(shipped.width)
    for variant in variants(shipped):
        for changed in ({}, {"HAS_OFFSET": True}) if shipped.dropout else ({},):
            launched = planned(shipped, Variant(variant.unit_strides, variant.flags | changed))
            for rank_by_16 in (True, False) if shipped.dropout else (True,):
                options: dict[str, Any] = {"rank_by_16": rank_by_16, "tf32": dtype == "tf32", "version": version}
                figures = figures_of(shipped, launched, "sm_90", dtypes, **options)
                assert figures.faults() == [], f"{launched}: {figures}"


@pytest.mark.parametrize(("shipped", "target"), [case for case in cases() if case.values[0].kernel == "shrink"])
def test_a_shrink_that_is_split_or_followed_has_no_faults(shipped: ShippedTile, target: str) -> None:
    (plain,) = variants(shipped)
    for changed in ({"IS_PARTIAL": True}, {"LAUNCHES_DEPENDENTS": True}):
        if target in ("sm_90", "sm_100") or "IS_PARTIAL" in changed:
            figures = figures_of(shipped, Variant(plain.unit_strides, plain.flags | changed), target)
            assert figures.faults() == [], f"{changed}: {figures}"


@pytest.mark.parametrize(
    ("shipped", "target"), [c for c in cases() if c.values[0].width == "32" and c.values[1].startswith("sm_")]
)
def test_a_tile_has_no_faults_in_tf32(shipped: ShippedTile, target: str) -> None:
    for variant in variants(shipped):
        figures = figures_of(shipped, variant, target, tf32=True)
        assert figures.faults() == [], f"{variant}: {figures}"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtypes", [("fp32",), ("bf16",), ("bf16", "bf16", "fp32")], ids="-".join)
def test_the_reduction_has_no_faults(target: str, dtypes: tuple[str, ...]) -> None:
    signature, constexprs = {}, {"COUNT": len(dtypes), "LAUNCHES_DEPENDENTS": False, "BLOCK": BLOCK, "STAGES": STAGES}
    for index in range(MOST):
        given = {f"partials_{index}_ptr": "*fp32", f"splits_{index}": "i32", f"elements_{index}": "i32"}
        given[f"scale_{index}"] = "fp32"
        if index < len(dtypes):
            signature |= given | {f"out_{index}_ptr": f"*{dtypes[index]}"}
        else:
            constexprs |= dict.fromkeys([*given, f"out_{index}_ptr"])
    aligned = [name for name in signature if name.endswith("_ptr")]
    figures = kept_figures(reduce_partials_kernel, signature, constexprs, target, 4, 1, aligned)
    assert figures.faults() == []
    if target.startswith("sm_"):
        # A chain of shares must not wait for each in turn: all but one of the ring are on their way before the first
        # wait. The assembler numbers the groups that may stay unfinished.
        assert figures.sequence[: figures.sequence.index("DEPBAR")].count("LDGDEPBAR") == STAGES - 1
        assert figures.sass.count(f"DEPBAR.LE SB0, 0x{STAGES - 2:x}") >= len(dtypes)


@pytest.mark.parametrize("target", TARGETS)
def test_operands_in_parts_have_no_faults(target: str) -> None:
    pointers = {"s_ptr": "*fp32", "s_parts_ptr": "*bf16", "e_ptr": "*fp32", "e_parts_ptr": "*bf16"}
    sizes = ("s_elements", "e_elements", "R", "e_columns", "stride_e_row", "stride_e_parts_row", "stride_e_part")
    constexprs = {"stride_e_column": 1, "BLOCK": PARTS_BLOCK}
    figures = kept_figures(
        in_parts_kernel, pointers | dict.fromkeys(sizes, "i32"), constexprs, target, 4, 3, list(pointers)
    )
    assert figures.faults() == []


def planned(shipped: ShippedTile, variant: Variant) -> Variant:
    """Of dB's kernel what a plan asks for without a trained bias: dyb beside it only where its shares are few."""
    if shipped.kernel != "bwd_lora_b":
        return variant
    one_read = 8 * shipped.tile.block_r <= shipped.tile.block_n * (4 if shipped.width == "32" else 2)
    return Variant(variant.unit_strides, variant.flags | {"NEEDS_D_BIAS": False, "NEEDS_DYB": one_read})


def test_the_warps_of_a_gradient_reside_on_a_multiprocessor() -> None:
    # What the planner counts on (`WARPS_PER_SM`): two programs of four warps, or one of eight. Registers come by eights
    # of a thread's, 64 Ki of them; of the shared memory 1 KiB of each program is the system's.
    for shipped in shipped_tiles("hopper"):
        if shipped.kernel not in ("bwd_lora_b", "bwd_lora_a", "bwd_dx_lora_a"):
            continue
        for variant in variants(shipped):
            figures = figures_of(shipped, planned(shipped, variant), "sm_90")
            by_registers = (1 << 16) // (-(-figures.registers // 8) * 8 * 32 * shipped.tile.num_warps)
            by_shared = 228 * 1024 // (figures.shared_bytes + 1024)
            assert min(by_registers, by_shared) * shipped.tile.num_warps >= WARPS_PER_SM, shipped


HOPPER_GEMM = next(
    s for s in shipped_tiles("hopper") if s.kernel == "gemm_expand_tma" and s.width == "16" and s.tile.block_n == 256
)


MATRIX = {"sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HMMA", "sm_100": "HMMA", "gfx942": "v_mfma"}
"""What multiplies 16 rows: wgmma takes 64 at least, tcgen05 too."""


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("target", TARGETS)
def test_few_rows_under_fp32_adapters_run_on_the_matrix_unit(target: str, dtype: str) -> None:
    family = FAMILY_OF_ARCH[target]
    tile = tile_of(family, "mixed", "one_pass", rows=16, rank=16)
    assert tile is not None
    shipped = ShippedTile("one_pass", family, "mixed", False, tile)
    opcodes = figures_of(shipped, variants(shipped)[0], target, (dtype, "fp32"), rank_by_16=True).opcodes
    # In each step at least: the weight's product, and the adapter's two or three.
    assert sum(count for name, count in opcodes.items() if name.startswith(MATRIX[target])) >= 3


def test_the_hopper_gemm_runs_on_wgmma_and_tma() -> None:
    for variant in variants(HOPPER_GEMM):
        opcodes = figures_of(HOPPER_GEMM, variant, "sm_90").opcodes
        assert opcodes["HGMMA"] > 0
        assert opcodes["UTMALDG"] > 0
        assert opcodes["UTMASTG"] > 0


def test_hopper_products_do_not_wait_for_each_other() -> None:
    # wgmma is asynchronous unless the assembler finds other instructions on accumulators in flight (its C7515).
    # one_pass at r = 128 and dA under dropout are left: the first is not memory's to wait for, the second the mask's.
    kernels = ("shrink", "gemm_expand", "gemm_expand_tma", "bwd_lora_b")
    for shipped in shipped_tiles("hopper"):
        if shipped.kernel not in kernels or shipped.width != "16" or shipped.dropout:
            continue
        for variant in variants(shipped):
            figures = figures_of(shipped, planned(shipped, variant), "sm_90", rank_by_16=True)
            waits = len(re.findall(r"WARPGROUP\.DEPBAR", figures.sass))
            if shipped.tile.block_m < 64 and shipped.kernel == "shrink":
                assert (waits, figures.opcodes["HGMMA"]) == (0, 0)  # wgmma takes 64 rows at least
                continue
            assert waits < figures.opcodes["HGMMA"], f"{shipped}: {waits} of {figures.opcodes['HGMMA']}"


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_a_dependent_launch_waits_before_it_reads_s_or_writes(target: str) -> None:
    family = FAMILY_OF_ARCH[target]
    for shipped in shipped_tiles(family):
        if shipped.kernel != "gemm_expand_tma" or shipped.dropout:
            continue
        backward, forward = variants(shipped)
        assert "ACQBULK" not in figures_of(shipped, backward, target).opcodes
        figures = figures_of(shipped, forward, target)
        # The wait, then every read through pointers (s, e, the bias) and the write of out; before it, descriptors only.
        order = figures.sequence
        wait = order.index("ACQBULK")
        assert order.count("ACQBULK") == 1
        assert not {"LDG", "LDGSTS", "STG", "UTMASTG"} & set(order[:wait])
        assert {"LDG", "LDGSTS"} & set(order[wait:])
        assert "UTMASTG" in order[wait:]
        assert "UTMALDG" in order[:wait]


@pytest.mark.parametrize("width", WIDTHS)
def test_only_a_shrink_that_is_told_to_launches_dependents(width: Width) -> None:
    shipped = next(s for s in shipped_tiles("hopper") if s.kernel == "shrink" and s.width == width)
    (plain,) = variants(shipped)
    launching = Variant(plain.unit_strides, plain.flags | {"LAUNCHES_DEPENDENTS": True})
    assert "PREEXIT" not in figures_of(shipped, plain, "sm_90").opcodes
    figures = figures_of(shipped, launching, "sm_90")
    assert figures.opcodes["PREEXIT"] == 1
    assert figures.faults() == []
    # Early: before the first of x is read.
    assert figures.sequence.index("PREEXIT") < figures.sequence.index("LDGSTS")
