"""The walk for registers of products in flight: red where there is a hazard, green where the code waits in time.

`test_linear_tiles` and `test_persistent` hold every shipped kernel to it, under two versions of Triton.
"""

from pathlib import Path

import pytest

from tests.compile.hazards import hazards
from tests.compile.support import _OF_REGISTERS

# Of `shrink`, 64 x 128 with a mask, bf16, rank 16, as Triton 3.6 compiled it: the loop's products and waits, and one
# write of each register that they read. Seven groups are still running where the next step begins.
FRAGMENT = (Path(__file__).parent / "hazard.sass").read_text(encoding="utf-8")
LAST_WAIT = "/*5650*/ WARPGROUP.DEPBAR.LE gsb0, 0x7"


def test_the_miscompiled_loop_is_found():
    found = hazards(FRAGMENT)
    assert {h.what for h in found} == {"overwrites what is still read by"}
    # Of eight products all but the first, which the last wait has seen to its end, with four registers each.
    assert len(found) == 7 * 4
    assert "LOP3.LUT R40, R17, UR21, RZ, 0x3c, !PT overwrites what is still read by HGMMA" in str(found[0])


@pytest.mark.parametrize(("left", "expected"), [(0, 0), (1, 4), (3, 12), (7, 28)])
def test_the_wait_at_the_end_of_a_step_decides(left, expected):
    assert FRAGMENT.count(LAST_WAIT) == 1
    assert len(hazards(FRAGMENT.replace(LAST_WAIT, LAST_WAIT[:-1] + str(left)))) == expected


def sass(*lines: str) -> str:
    return "".join(
        f"{line}\n" if line.startswith(".") else f"/*{16 * n:04x}*/ {line} ;\n" for n, line in enumerate(lines)
    )


IN_REGISTERS = "HGMMA.64x16x16.F32.BF16 R24, R40, gdesc[UR20], R24, gsb0"
IN_SHARED = "HGMMA.64x16x16.F32 R24, gdesc[UR20], R24, gsb0"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("MOV R43, R2", "overwrites what is still read by"),
        ("LDSM.16.M88.4 R40, [R2]", "overwrites what is still read by"),
        ("LDS.128 R36, [R2]", ""),  # R36 to R39
        ("LDS.64 R39, [R2]", "overwrites what is still read by"),
        ("IMAD.WIDE.U32 R42, R3, R4, RZ", "overwrites what is still read by"),
        ("@!P0 SHFL.IDX PT, R41, R2, R3, 0x1f", "overwrites what is still read by"),
        ("STG.E [R40.64], R41", ""),  # a read of what the product only reads, too
        ("STG.E [R2.64], R31", "reads the accumulator of"),
        ("STG.E.128 desc[UR4][R2.64], R21", "reads the accumulator of"),  # R21 to R24
        ("STG.E.128 desc[UR4][R2.64], R20", ""),
        ("LDS R5, [R23.64]", "reads the accumulator of"),
        ("HMMA.16816.F32 R64, R21, R8, R64", "reads the accumulator of"),
        ("FADD R5, R31, R31", "reads the accumulator of"),
        ("MOV R24, RZ", "overwrites the accumulator of"),
        ("MOV R32, RZ", ""),  # sixteen columns are eight registers
        ("HGMMA.64x16x16.F32 R24, gdesc[UR8], R24, gsb0", ""),  # a chain on one accumulator
        ("HGMMA.64x16x16.F32.BF16 R48, R24, gdesc[UR8], R48, gsb0", "reads the accumulator of"),
        ("ISETP.GE.AND P0, PT, R2, R3, PT", ""),
        ("R2UR UR4, R2", ""),
    ],
)
def test_each_use_of_a_register_in_flight(line, what):
    found = {h.what for h in hazards(sass(IN_REGISTERS, line, WAIT, "EXIT"))}
    assert found == ({what} if what else set())
    assert hazards(sass(IN_REGISTERS, WAIT, line, WAIT, "EXIT")) == []


def test_both_ways_of_a_branch_are_walked():
    skipped = sass(IN_SHARED, "@P0 BRA `(.L_x_1)", WAIT, ".L_x_1:", "FADD R5, R24, R24", "EXIT")
    assert [h.what for h in hazards(skipped)] == ["reads the accumulator of"]
    taken = sass(IN_SHARED, "BRA `(.L_x_1)", "FADD R5, R24, R24", ".L_x_1:", WAIT, "EXIT")
    assert hazards(taken) == []


@pytest.mark.parametrize(("jump", "goes_on"), [
    ("BRA `(.L_x_1)", False), ("BRA.U `(.L_x_1)", False), ("BRA.U UP0, `(.L_x_1)", True), ("@!UP1 BRA `(.L_x_1)", True),
])  # fmt: skip
def test_what_follows_a_jump_is_walked_where_the_jump_has_a_predicate(jump, goes_on):
    after = sass(IN_SHARED, jump, "FADD R5, R24, R24", ".L_x_1:", WAIT, "EXIT")
    assert [h.what for h in hazards(after)] == ["reads the accumulator of"] * goes_on


def test_an_outer_loop_is_walked():
    loops = sass(
        ".L_x_1:", "MOV R40, R2", WAIT, ".L_x_2:", IN_REGISTERS, "@P1 BRA `(.L_x_2)", "@P0 BRA `(.L_x_1)", WAIT, "EXIT"
    )
    assert [h.instruction for h in hazards(loops)] == ["MOV R40, R2", IN_REGISTERS]  # and its inner loop never waits


def test_a_loop_that_never_waits_is_said():
    loop = sass(".L_x_1:", IN_SHARED, "@P0 BRA `(.L_x_1)", WAIT, "EXIT")
    assert [h.what for h in hazards(loop)] == ["is never waited for:"]


def test_on_sm_100_a_product_names_no_register():
    assert not _OF_REGISTERS.findall(
        "/*0040*/ UTCHMMA gdesc[UR14], gdesc[UR12], tmem[UR4], tmem[UR6], idesc[UR7], UP0 ;"
    )
    assert _OF_REGISTERS.findall("/*0040*/ UTCHMMA gdesc[UR14], gdesc[UR12], tmem[R4], tmem[UR6], idesc[UR7], UP0 ;")
