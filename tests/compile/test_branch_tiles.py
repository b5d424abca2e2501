"""The branch's kernels where base_out has another dtype than x: every tile that such a call can be given, no spills.

`test_linear_tiles` compiles every shipped tile for the dtypes that its width is named for, `expand`'s too. An fp32
output over 16-bit adapters runs in the tiles of width "32", and one 16-bit dtype beside the other in those of "mixed".
"""

from collections.abc import Iterator
from typing import Any

import pytest

from lora_kernels.planning.tiles import FAMILY_OF_ARCH, ShippedTile, shipped_tiles
from tests.compile.support import TARGETS
from tests.compile.test_linear_tiles import Variant, figures_of, variants

# (output's dtype, adapters'), by the width whose tiles serve them.
OTHER_DTYPES = {"32": ("fp32", "bf16"), "mixed": ("fp16", "bf16")}


def of_the_output(shipped: ShippedTile) -> list[Variant]:
    """The launches over base_out, y and dy: dyb reads B along its rows, as lora_B.T."""
    if shipped.kernel == "expand":
        return [variant for variant in variants(shipped) if variant.flags["HAS_BASE"]]
    if shipped.kernel == "bwd_lora_b":
        return [Variant(v.unit_strides, v.flags | {"NEEDS_D_BIAS": False}) for v in variants(shipped)]
    if shipped.kernel == "shrink" and not shipped.dropout:
        return [Variant(("stride_x_k", "stride_a_r"), v.flags) for v in variants(shipped)]
    return []


def cases() -> Iterator[Any]:
    for target in TARGETS:
        for shipped in shipped_tiles(FAMILY_OF_ARCH[target]):
            if shipped.width in OTHER_DTYPES:
                for variant in of_the_output(shipped):
                    t = shipped.tile
                    tile = f"{t.block_m}x{t.block_n}x{t.block_k}r{t.block_r}w{t.num_warps}s{t.num_stages}"
                    yield pytest.param(shipped, variant, target, id=f"{target}-{shipped.kernel}-{shipped.width}-{tile}")


@pytest.mark.parametrize(("shipped", "variant", "target"), list(cases()))
def test_a_tile_has_no_faults_with_an_output_of_another_dtype(
    shipped: ShippedTile, variant: Variant, target: str
) -> None:
    figures = figures_of(shipped, variant, target, OTHER_DTYPES[shipped.width])
    assert figures.faults() == [], figures


@pytest.mark.parametrize("target", TARGETS)
def test_16_bit_adapters_under_an_fp32_output_are_multiplied_as_they_are(target: str) -> None:
    # On the matrix unit, where the fp32 products of this tile's own width are FMAs (NVIDIA) or fp32 instructions (AMD).
    shipped = next(s for s in shipped_tiles(FAMILY_OF_ARCH[target]) if s.kernel == "expand" and s.width == "32")
    (variant,) = of_the_output(shipped)
    opcodes = figures_of(shipped, variant, target, OTHER_DTYPES["32"]).opcodes
    matrix = {"sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma_f32_32x32x8_bf16"}.get(target, "HMMA")
    assert opcodes[matrix] > 0, opcodes
