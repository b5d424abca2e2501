"""The planner's rules, for machines that are here and machines that are not."""

import dataclasses
from pathlib import Path

import pytest
import torch

from bench import modelled
from lora_kernels import UnsupportedError, explain_plan
from lora_kernels.benchmarking.records import Record, read_csv
from lora_kernels.planning import Plan, Problem, cost, make_plan
from lora_kernels.planning.cost import Costs, _Side
from lora_kernels.planning.measured import row_bucket
from lora_kernels.planning.plan import kernel_choices, ways_of
from lora_kernels.planning.problem import Way
from lora_kernels.planning.tiles import (
    FAMILIES,
    MAX_RANK,
    WIDTHS,
    Tile,
    fewest_programs,
    padded_rank,
    shipped_tiles,
    table_of,
)

RESULTS = Path(modelled.__file__).with_name("results")
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "sm_199", "gfx90a"]
WIDTH_DTYPES = {"16": (BF16, BF16), "mixed": (BF16, FP32), "32": (FP32, FP32)}


# A plan follows rank by the limits of the tables' entries, by the power of two that a tile pads it to, and by dB's tile
# against its columns (`dyb_columns`): all of these, and their neighbours.
LIMITS = {2**n for n in range(10)} | {
    limit
    for family in FAMILIES
    for entries in (table_of(family).tiles, table_of(family).variants)
    for by_width in entries.values()
    for of_width in by_width.values()
    for entry in of_width
    for limit in (entry.rank, entry.tile.block_n // 4, entry.tile.block_n // 2)
}
RANKS_AROUND_LIMITS = sorted({r for limit in LIMITS for r in (limit - 1, limit, limit + 1) if 1 <= r <= MAX_RANK})


def problem(m=4096, n=1024, k=512, r=16, *, width="16", arch="sm_90", **changes) -> Problem:
    dtype, adapter_dtype = WIDTH_DTYPES[width]
    options = {"dropout": False, "device_type": "cuda", "sm_count": 132, **changes}
    return Problem(m, n, k, r, dtype, adapter_dtype, arch=arch, **options)


def plan(backend="auto", triton_available=True, **options) -> Plan:
    return make_plan(problem(**options), backend, triton_available=triton_available)


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16, FP64], ids=str)
@pytest.mark.parametrize("m", [0, 1, 16, 4096])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_explain_plan_on_the_cpu(dtype, m, dropout_p):
    told = explain_plan(m, 64, 64, 8, dtype=dtype, device="cpu", dropout_p=dropout_p)
    assert told.backend == "torch"
    assert told.strategy in (("library",) if dtype in (FP32, FP64) else ("library", "upcast"))
    assert told.reason
    assert isinstance(told, Plan)


def test_explain_plan_takes_devices_and_adapter_dtypes():
    for device in ("cpu", torch.device("cpu")):
        assert explain_plan(8, 8, 8, 8, dtype=BF16, adapter_dtype=FP32, device=device).backend == "torch"
    assert explain_plan(8, 8, 8, 8, dtype=FP32, device="cpu", dropout_p=0.5, training=False).backend == "torch"


def test_plans_are_values():
    told = plan("triton")
    assert told == plan("triton")
    assert hash(told) == hash(plan("triton"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        told.backend = "torch"
    with pytest.raises(dataclasses.FrozenInstanceError):
        told.tile("shrink").block_m = 1


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("m", [1, 4096])
@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
def test_an_explicit_backend_is_honoured(backend, m, dropout, width):
    assert plan(backend, m=m, dropout=dropout, width=width).backend == backend


OBSTACLES = {
    "no triton": ({"triton_available": False}, "triton is not installed"),
    "cpu": ({"device_type": "cpu", "arch": "cpu"}, "TRITON_INTERPRET=1"),
    "old GPU": ({"arch": "sm_75"}, "sm_75 is older than sm_80"),
    "other device": ({"device_type": "mps", "arch": "mps"}, "not on 'mps'"),
    "interpreter on a GPU": ({"interpreted": True}, "interpreter runs on CPU tensors"),
}


@pytest.mark.parametrize("case", OBSTACLES)
def test_triton_that_cannot_serve_raises_and_auto_falls_back(case):
    options, reason = OBSTACLES[case]
    with pytest.raises(UnsupportedError, match=f"backend='triton' cannot serve.*{reason}.*backend='auto'"):
        plan("triton", **options)
    fallen = plan("auto", **options)
    assert fallen.backend == "torch"
    assert fallen.reason
    assert plan("torch", **options).backend == "torch"
    assert plan("reference", **options).backend == "reference"


def test_fp64_is_for_torch_and_reference():
    wide = dataclasses.replace(
        problem(), dtype=FP64, adapter_dtype=FP64, device_type="cpu", arch="cpu", interpreted=True
    )
    with pytest.raises(UnsupportedError, match="fp64"):
        make_plan(wide, "triton", triton_available=True)
    assert make_plan(wide, "auto", triton_available=True).backend == "torch"
    assert make_plan(wide, "torch", triton_available=True).strategy == "library"


def test_auto_never_chooses_the_interpreter():
    interpreted = {"device_type": "cpu", "arch": "cpu", "interpreted": True}
    assert plan("auto", **interpreted).backend == "torch"
    assert plan("triton", **interpreted).backend == "triton"
    assert not plan("triton", **{**interpreted, "arch": "sm_90"}).use_tma


@pytest.mark.parametrize(("m", "r", "dropout", "strategy"), [
    (1, 16, False, "one_pass"),
    (64, 16, False, "one_pass"),
    (65, 16, False, "shrink_fused"),
    (1, 512, False, "shrink_fused"),
    (64, 16, True, "one_pass"),
    (65, 16, True, "shrink_fused"),
])  # fmt: skip
def test_strategy(m, r, dropout, strategy):
    assert plan("triton", m=m, n=8192, r=r, dropout=dropout).strategy == strategy


@pytest.mark.parametrize(
    ("m", "n", "k", "splits"),
    [
        (1, 1024, 4096, 8),  # 16 columns of tiles, eight times, on 132 multiprocessors
        (64, 1024, 4096, 8),
        (1, 64, 1 << 20, 64),  # never more than 64 partial sums
        (1, 64, 4096, 8),  # four steps of 128 each
        (1, 64, 4 * 128 - 1, 1),
        (1, 64 * 66, 4096, 2),
        (1, 64 * 67, 4096, 1),  # more than half of the GPU is filled without
    ],
)
def test_one_pass_splits_fill_the_gpu(m, n, k, splits):
    told = plan("triton", m=m, n=n, k=k)
    assert told.strategy == "one_pass"
    assert told.one_pass_splits == splits
    assert plan("triton", m=m, n=n, k=k, r=512).one_pass_splits == 1  # no tile holds that rank


def test_one_pass_is_split_twice_as_often_where_adapters_are_cut_in_parts():
    for k, splits in ((4096, 4), (2048, 4), (512, 2), (256, 1)):  # of 64 x 4 elements of K at least
        assert plan("triton", m=16, n=4096, k=k, width="mixed").one_pass_splits == splits
    fp16 = dataclasses.replace(problem(m=16, n=4096, k=4096, width="mixed"), dtype=torch.float16)
    assert make_plan(fp16, "triton", triton_available=True).one_pass_splits == 2


@pytest.mark.parametrize("width", WIDTHS)
def test_dy_is_read_once_only_where_its_shares_are_smaller(width):
    for r in range(1, 513):
        told = plan("triton", r=r, width=width)
        tile = told.tile("bwd_lora_b")
        itemsize = 4 if width == "32" else 2
        # Of each row of a tile: fp32 shares written and read again, against dy read again.
        assert (told.dy_reads == 1) == (r <= tile.block_r and (4 + 4) * r <= tile.block_n * itemsize)


@pytest.mark.parametrize("rank", [1, 16, 31, 32, 33, 64, 200])
@pytest.mark.parametrize("width", WIDTHS)
def test_dyb_costs_its_shares_or_another_read_of_dy(width, rank):
    asked = problem(r=rank, width=width)
    tile = plan("triton", r=rank, width=width).tile("bwd_lora_b")
    shares = 8 * rank / (tile.block_n * asked.dtype.itemsize)
    of_a_read = min(shares, 1.0) if rank <= tile.block_r else 1.0
    model, side = Costs(asked, {}), _Side(asked, asked.N)
    assert model._dyb() == pytest.approx(of_a_read * model._pass(asked.M, asked.N, 1))
    assert side.dyb() == pytest.approx(of_a_read * side.streams(1))


def test_auto_prefers_kernels_where_the_library_needs_passes_over_x():
    assert plan(m=1, n=8192).backend == "triton"
    assert plan(dropout=True).backend == "triton"
    assert plan(width="mixed").backend == "triton"
    assert plan(m=128, n=1024, k=4096).backend == "torch"  # too few tiles for 132 multiprocessors


def test_few_rows_under_fp32_adapters_are_expanded_into_the_librarys_product():
    # one_pass reads a weight at 0.39 of the library's rate there: it pays where launches cost more than the weight.
    for m in (1, 16):
        large, small = (plan(m=m, n=n, k=n, width="mixed") for n in (4096, 1024))
        assert (large.backend, large.strategy) == ("triton", "library")
        assert (small.backend, small.strategy) == ("triton", "one_pass")


def test_a_gpu_of_a_known_name_has_its_own_rates():
    h200, h100, other = (
        dict(make_plan(problem(m=8192, n=4096, k=4096, device=name), "auto", triton_available=True).costs)
        for name in ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "")
    )
    assert h200 == other  # the family's first
    assert h100["triton/library"] > h200["triton/library"]  # which reads and writes more, at 3.35 TB/s for 4.8


@pytest.mark.parametrize("arch", ["sm_80", "sm_100", "gfx942"])
def test_where_nothing_was_measured_our_gemm_is_taken_for_slow(arch):
    costs = dict(plan(m=8192, n=8192, k=8192, arch=arch).costs)
    assert 1.1 < costs["triton/shrink_fused"] / costs["torch/library"] < 1 / 0.8


def test_the_persistent_kernel_serves_whole_16_bytes_without_a_mask_over_dx():
    able = problem(n=4096, k=4096, gluon=True)
    told = make_plan(able, "auto", triton_available=True)
    assert (told.strategy, told.backward) == ("persistent", Way("triton", "persistent"))
    for unable in (dataclasses.replace(able, gluon=False), dataclasses.replace(able, R=12)):
        assert Way("triton", "persistent") not in ways_of(unable, "forward", ("triton",))
    masked = dataclasses.replace(able, dropout=True)
    assert Way("triton", "persistent") not in ways_of(masked, "backward", ("triton",))


@pytest.mark.parametrize(("count", "sm_count", "programs"), [
    (1024, 132, 128), (256, 132, 128), (64, 132, 64), (1, 132, 1), (133, 132, 67), (1024, 1, 1), (7, 3, 3),
])  # fmt: skip
def test_a_persistent_kernel_has_as_many_programs_as_its_waves_need(count, sm_count, programs):
    assert fewest_programs(count, sm_count) == programs


def test_d_a_runs_beside_dx_where_it_takes_longer_than_that_costs(monkeypatch):
    large = {"m": 8192, "n": 4096, "k": 4096, "gluon": True}
    assert plan("triton", **large).beside
    for changed in ({"m": 256}, {"k": 64}, {"arch": "sm_100"}, {"device_type": "cpu", "interpreted": True}):
        assert not plan("triton", **large | changed).beside

    # Beside a product of four times the length four idle multiprocessors read what they had no time for before.
    def backward(n):
        asked = problem(**large | {"n": n})
        return Costs(asked, dict(kernel_choices(asked).tiles)).of(Way("triton", "persistent"), backward=True)

    together = {n: backward(n) for n in (1024, 4096)}
    monkeypatch.setattr(cost, "runs_beside", lambda _: False)
    saved = {n: backward(n) - us for n, us in together.items()}
    assert 0 < saved[1024] < 0.6 * saved[4096]


def test_the_model_is_within_15_percent_of_what_an_h200_took():
    # But for 64 rows, where one_pass is slower than its rate for few says (docs/design/performance-log.md).
    lines = modelled.held_to(read_csv(RESULTS / "nvidia-h200" / "linear.csv", Record))[2:]
    ratios = {line: float(line.split("|")[-2]) for line in lines if "M = 64," not in line}
    assert len(ratios) == 24
    assert {line: ratio for line, ratio in ratios.items() if not 0.85 < ratio < 1.15} == {}


def test_precision_of_fp32_products():
    assert plan("triton", width="32").precision == "ieee"
    assert plan("triton", width="32", tf32=True).precision == "tf32"
    # fp32 adapters are never multiplied in plain tf32, which would drop 13 of their 23 bits.
    for tf32 in (True, False):
        assert plan("triton", width="mixed", tf32=tf32).precision == "tf32x3"
        for width in WIDTHS:
            assert plan("triton", width=width, tf32=tf32, arch="gfx942").precision == "ieee"


def test_descriptors_only_where_there_is_hardware_for_them():
    with_tma = {arch for arch in ARCHITECTURES if plan("triton", arch=arch).use_tma}
    assert with_tma == {"sm_90", "sm_100"}
    assert not plan("triton", width="32").use_tma
    # Programmatic dependent launch came with the same GPUs, and is inline assembly, which the interpreter cannot run.
    assert with_tma == {arch for arch in ARCHITECTURES if plan("triton", arch=arch).use_pdl}
    assert not plan("triton", width="32").use_pdl
    assert not plan("triton", device_type="cpu", interpreted=True).use_pdl


@pytest.mark.parametrize(("arch", "like"), [("sm_199", "sm_89"), ("gfx90a", "gfx942")])
@pytest.mark.parametrize("width", WIDTHS)
def test_an_unknown_gpu_gets_its_vendors_smallest_tiles(arch, like, width):
    assert plan("triton", arch=arch, width=width).tiles == plan("triton", arch=like, width=width).tiles


@pytest.mark.parametrize(("m", "n", "narrow"), [
    (8192, 4096, False),  # 1024 tiles of 128 x 256
    (8192, 1024, False),  # 256: two waves, the second nearly full
    (512, 4096, True),  # 64, half of the GPU; of 128 x 128 twice as many
    (1024, 1024, True),
    (512, 14336, False),  # 224, a wave and two thirds; narrow ones need four of half the area
])  # fmt: skip
def test_the_tile_of_a_large_product_fills_the_gpu(m, n, narrow):
    told = plan("triton", m=m, n=n, k=n)
    for kernel in ("gemm_expand_tma", "persistent"):
        assert (told.tile(kernel).block_n == 128) == narrow
        assert told.tile(kernel) == told.tile(kernel, backward=True)


@pytest.mark.parametrize("width", ["16", "mixed"])
@pytest.mark.parametrize("sm_count", [1, 8, 132, 10_000])
@pytest.mark.parametrize("m", [1, 100, 65536])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (4096, 14336)])
def test_splits(sm_count, m, n, k, width):
    told = plan("triton", m=m, n=n, k=k, sm_count=sm_count, width=width)
    m = row_bucket(m)
    shrink, lora_a, lora_b = (told.tile(kernel) for kernel in ("shrink", "bwd_lora_a", "bwd_lora_b"))
    dx_lora_a = told.tile("bwd_dx_lora_a_dropout")
    # Each reduction is split by its own kernel's grid: programs without splits, and steps there are to share.
    for splits, programs, steps in (
        (told.xa_splits, -(-m // shrink.block_m), -(-k // shrink.block_k)),
        (told.dyb_splits, -(-m // shrink.block_m), -(-n // shrink.block_k)),
    ):
        once = max(1, min(sm_count // programs, steps, 64))
        assert splits == (once if width == "16" else max(once, min(4 * sm_count // programs, steps // 4, 64)))
    # A gradient's, whose shares are added up in any case, for eight warps on each multiprocessor, of four steps each.
    for splits, programs, steps, resident in (
        (told.d_lora_A_splits, -(-k // lora_a.block_k), -(-m // lora_a.block_m), 8 // lora_a.num_warps),
        (told.dx_lora_A_splits, -(-k // dx_lora_a.block_k), -(-m // dx_lora_a.block_m), 8 // dx_lora_a.num_warps),
        (told.d_lora_B_splits, -(-n // lora_b.block_n), -(-m // lora_b.block_m), 1 if width == "16" else 4),
    ):
        once = max(1, min(sm_count // programs, steps, 64))
        assert splits == max(once, min(resident * sm_count // programs, steps // 4, 64))


@pytest.mark.parametrize("rank", range(1, 513))
def test_padded_rank(rank):
    padded = padded_rank(rank)
    assert is_power_of_two(padded)
    assert padded >= max(rank, 16)
    assert padded < 2 * rank or padded == 16


def assert_well_formed(kernel: str, tile: Tile) -> None:
    used = {
        "persistent": "mnkr", "gemm_expand": "mnkr", "gemm_expand_tma": "mnkr",
        "one_pass": "mnkr", "one_pass_sum": "mnr", "shrink": "mkr",
        "bwd_lora_b": "mnr", "bwd_lora_a": "mkr", "bwd_dx_lora_a": "mkr", "expand": "mnr",
    }[kernel.removeprefix("backward.").removesuffix("_dropout")]  # fmt: skip
    for letter in used:
        block = getattr(tile, f"block_{letter}")
        # 16: what a matrix unit multiplies; also a multiple of 8, as the mask's blocks of columns must be.
        assert is_power_of_two(block), (kernel, letter, tile)
        assert block >= 16, (kernel, letter, tile)
    assert tile.num_warps in (1, 2, 4, 8)
    assert 1 <= tile.num_stages <= 6


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("m", [1, 17, 100, 8192])
def test_every_rank_has_a_plan(arch, width, m):
    for rank in RANKS_AROUND_LIMITS:
        for dropout in (False, True):
            told = plan("triton", m=m, r=rank, dropout=dropout, width=width, arch=arch)
            needed = {"shrink", "bwd_lora_a", "bwd_lora_b", "gemm_expand" + ("_dropout" if dropout else "")}
            if told.strategy == "one_pass":
                assert told.tile("one_pass").block_r >= rank  # one pass has no second look at x
                assert told.tile("one_pass_sum").block_r >= rank
                needed |= {"one_pass", "one_pass_sum"}
            if told.use_tma:
                needed.add("gemm_expand_tma" + ("_dropout" if dropout else ""))
            assert needed <= set(dict(told.tiles))
            for kernel, tile in told.tiles:
                assert_well_formed(kernel, tile)


@pytest.mark.parametrize("family", FAMILIES)
def test_plans_use_shipped_tiles_only(family):
    # What the compile-only tests cover is what users get.
    arch = {"blackwell": "sm_100", "hopper": "sm_90", "ampere": "sm_80", "ada": "sm_89", "cdna3": "gfx942"}[family]
    shipped = {(entry.kernel, entry.width, entry.dropout, entry.tile) for entry in shipped_tiles(family)}
    for width in WIDTHS:
        for rank in (1, 3, 8, 16, 17, 40, 64, 100, 128, 200, 256, 300, 512):
            for m in (1, 15, 16, 17, 64, 65, 128, 129, 4096, 1 << 20):
                told = plan("triton", m=m, r=rank, width=width, arch=arch)
                for kernel, tile in told.tiles:
                    masked = kernel.endswith("_dropout")
                    entry = (kernel.removeprefix("backward.").removesuffix("_dropout"), width, masked, tile)
                    assert entry in shipped, entry
