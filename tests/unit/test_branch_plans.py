"""The branch's plans, for machines that are here and machines that are not."""

import dataclasses

import pytest
import torch

from lora_kernels import UnsupportedError
from lora_kernels.planning import BranchPlan, make_branch_plan
from lora_kernels.planning.problem import obstacle_to_triton
from lora_kernels.planning.tiles import FAMILY_OF_ARCH, shipped_tiles, tile_of
from tests.unit.test_planning import ARCHITECTURES, OBSTACLES, WIDTH_DTYPES, problem

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# Each kernel of a branch, by the side whose dtype it reads.
X_SIDE = ("shrink", "expand", "bwd_lora_a", "bwd_dx_lora_a_dropout")
OUT_SIDE = ("shrink", "expand", "bwd_lora_b")


def plan(backend="auto", out=None, *, triton_available=True, **options) -> BranchPlan:
    asked = problem(**options)
    return make_branch_plan(asked, asked.dtype if out is None else out, backend, triton_available=triton_available)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("m", [1, 4096])
@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize("width", WIDTH_DTYPES)
@pytest.mark.parametrize("out", [BF16, FP32, FP16], ids=str)
def test_an_explicit_backend_is_honoured_in_both_directions(backend, m, dropout, width, out):
    told = plan(backend, out, m=m, dropout=dropout, width=width)
    assert (told.backend, told.backward.backend) == (backend, backend)
    assert told.reason == "asked for by name"
    assert (told.x_side is not None) == (told.out_side is not None) == (backend == "triton")


@pytest.mark.parametrize("case", OBSTACLES)
def test_triton_that_cannot_serve_raises_and_auto_falls_back(case):
    options, reason = OBSTACLES[case]
    with pytest.raises(UnsupportedError, match=f"backend='triton' cannot serve.*{reason}.*backend='auto'"):
        plan("triton", **options)
    fallen = plan("auto", **options)
    assert (fallen.backend, fallen.backward.backend) == ("torch", "torch")
    assert fallen.reason


@pytest.mark.parametrize("wide", ["x", "out"])
def test_fp64_on_either_side_is_for_torch(wide):
    asked = dataclasses.replace(problem(), device_type="cpu", arch="cpu", interpreted=True)
    if wide == "x":
        asked = dataclasses.replace(asked, dtype=FP64, adapter_dtype=FP64)
    out = FP64 if wide == "out" else BF16
    with pytest.raises(UnsupportedError, match="fp64"):
        make_branch_plan(asked, out, "triton", triton_available=True)
    assert make_branch_plan(asked, out, "auto", triton_available=True).backend == "torch"
    assert obstacle_to_triton(BF16, "cpu", "cpu", interpreted=True, triton_available=True) is None


def test_each_side_has_the_tiles_and_the_precision_of_its_dtypes():
    for (x, adapters), out, x_width, out_width in (
        ((BF16, BF16), BF16, "16", "16"),
        ((BF16, BF16), FP32, "16", "32"),
        ((BF16, BF16), FP16, "16", "mixed"),
        ((BF16, FP32), BF16, "mixed", "mixed"),
        ((BF16, FP32), FP32, "mixed", "32"),
        ((FP32, FP32), BF16, "32", "mixed"),
    ):
        asked = dataclasses.replace(problem(), dtype=x, adapter_dtype=adapters)
        told = make_branch_plan(asked, out, "triton", triton_available=True)
        for side, width, kernels in ((told.x_side, x_width, X_SIDE), (told.out_side, out_width, OUT_SIDE)):
            for kernel in kernels:
                assert side.tile(kernel) == tile_of("hopper", width, kernel, rows=4096, rank=16), (kernel, width)
            # fp32 beside 16 bits is never multiplied in plain tf32, which would drop 13 of its 23 bits.
            assert side.precision == ("tf32x3" if width == "mixed" else "ieee")


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("width", WIDTH_DTYPES)
def test_every_rank_and_output_has_shipped_tiles(arch, width):
    family = problem(arch=arch).family
    assert FAMILY_OF_ARCH.get(arch, family) == family
    shipped = {(entry.kernel, entry.width, entry.tile) for entry in shipped_tiles(family)}
    for rank in (1, 8, 16, 17, 32, 33, 64, 100, 128, 256, 512):
        for m in (1, 17, 8192):
            for out in (BF16, FP32):
                told = plan("triton", out, m=m, r=rank, width=width, arch=arch)
                out_width = dataclasses.replace(problem(width=width), dtype=out).width
                for side, of, kernels in ((told.x_side, width, X_SIDE), (told.out_side, out_width, OUT_SIDE)):
                    for kernel in kernels:
                        assert (kernel.removesuffix("_dropout"), of, side.tile(kernel)) in shipped


def test_auto_takes_the_kernels_where_the_library_moves_more():
    # Its GEMM copies base_out first; under dropout or fp32 adapters it works on fp32 blocks and integer masks.
    for options in ({}, {"dropout": True}, {"width": "mixed"}, {"width": "mixed", "dropout": True}, {"width": "32"}):
        told = plan(m=8192, n=4096, k=4096, **options)
        assert (told.backend, told.strategy, told.backward.strategy) == ("triton", "shrink_expand", "shrink_expand")
        assert [way for way, _ in told.costs] == ["triton/shrink_expand", "torch/library"]
        assert all(us > 0 for _, us in (*told.costs, *told.backward_costs))
        assert "modelled, not measured" in told.reason


def test_auto_leaves_wide_fp32_ranks_to_the_library():
    # Past the ridge the matrix work counts, where the model gives our kernels 85 % of the library's rate.
    told = plan(m=8192, n=4096, k=4096, r=512, width="32")
    assert (told.backend, told.backward.backend) == ("torch", "torch")
    assert plan(m=8192, n=4096, k=4096, r=512, width="32", dropout=True).backend == "triton"


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100", "gfx942"])
def test_the_ranks_that_the_document_names(arch):
    # docs/ops/branch.md: where auto turns to the library without dropout, for a large problem.
    def served(rank, width, direction):
        told = plan(m=8192, n=4096, k=4096, r=rank, width=width, arch=arch)
        return told.backend if direction == "forward" else told.backward.backend

    assert {served(rank, "16", "forward") for rank in (1, 16, 64, 512)} == {"triton"}
    for width, direction, last, first in (
        ("16", "backward", 14, 33),
        ("32", "backward", 14, 33),
        ("32", "forward", 93, 301),
    ):
        assert served(last, width, direction) == "triton"
        if (arch, direction) != ("sm_89", "forward"):  # whose memory is slow beside its fp32 units
            assert served(first, width, direction) == "torch"


def test_costs_grow_with_what_they_are_of():
    small = dict(plan(m=1024, n=4096, k=4096).costs)
    for larger in ({"m": 8192}, {"n": 16384}, {"k": 16384}):
        more = dict(plan(**{"m": 1024, "n": 4096, "k": 4096, **larger}).costs)
        assert all(more[way] > small[way] for way in small)


def test_an_fp32_output_costs_its_bytes():
    narrow, wide = (dict(plan(out=out, m=8192, n=4096, k=4096).costs) for out in (BF16, FP32))
    assert all(wide[way] > narrow[way] for way in narrow)


def test_on_a_cpu_the_library_serves_and_upcasts_where_it_must():
    for dtype in (FP32, BF16, FP16, FP64):
        asked = dataclasses.replace(problem(device_type="cpu", arch="cpu"), dtype=dtype, adapter_dtype=dtype)
        told = make_branch_plan(asked, dtype, "auto", triton_available=True)
        assert told.backend == told.backward.backend == "torch"
        assert told.strategy == told.backward.strategy
        assert told.strategy in (("library",) if dtype in (FP32, FP64) else ("library", "upcast"))
        assert told.reason.startswith("tensors are on the CPU; ")


def test_plans_are_values_and_batch_sizes_share_them():
    assert plan("triton", m=4096) == plan("triton", m=2049) != plan("triton", m=64)
    assert hash(plan("triton")) == hash(plan("triton"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan().backend = "torch"
