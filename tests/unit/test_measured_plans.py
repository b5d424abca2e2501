"""Measured times: how they are kept, when they are ignored, and that the planner believes them."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st

from lora_kernels import config, explain_plan
from lora_kernels.planning import Way, make_plan, measured
from lora_kernels.planning.measured import Key, Timing, row_bucket
from lora_kernels.planning.plan import ways_of
from lora_kernels.planning.problem import DIRECTIONS, Problem
from lora_kernels.planning.tiles import Tile

DEVICE = "NVIDIA Test 9000"
KEY = Key("forward", 64, 4096, 4096, 16, "bfloat16", "float32", False, False)
TILE = Tile(block_m=64, block_n=64, block_k=64, block_r=16, num_warps=4, num_stages=3)
TIMINGS = {"torch/library": Timing(30.5), "triton/shrink_fused": Timing(21.25, (("gemm_expand", TILE),))}
HOPPER = Problem(
    64, 4096, 4096, 16, torch.bfloat16, torch.float32, False, arch="sm_90", device_type="cuda", sm_count=132
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "CACHE", tmp_path / "not" / "there yet")
    measured.forget()
    yield config.CACHE
    measured.forget()


@pytest.mark.parametrize(
    ("m", "bucket"), [(0, 16), (1, 16), (16, 16), (17, 32), (64, 64), (65, 128), (8192, 8192), (8193, 16384)]
)
def test_row_bucket(m, bucket):
    assert row_bucket(m) == bucket


def test_what_is_recorded_is_read_by_the_next_process(cache):
    assert measured.table_of(DEVICE) == {}
    path = measured.record(DEVICE, KEY, TIMINGS)
    assert path == cache / "plans-nvidia-test-9000.json"
    assert measured.table_of(DEVICE) == {KEY: TIMINGS}
    measured.forget()
    assert measured.table_of(DEVICE) == {KEY: TIMINGS}
    assert measured.table_of("another device") == {}
    assert [file.name for file in cache.iterdir()] == [path.name]  # nothing half-written is left


def test_two_processes_tune_into_one_file(cache):
    measured.record(DEVICE, KEY, TIMINGS)
    measured.forget()
    measured.table_of(DEVICE)  # this process has read the file
    ours, theirs = KEY._replace(M=128), KEY._replace(M=256)
    path = measured.path_of(DEVICE)
    content = json.loads(path.read_text())
    content["rows"].append({**content["rows"][0], "M": 256})
    path.write_text(json.dumps(content))
    measured.record(DEVICE, ours, TIMINGS)
    measured.forget()
    assert set(measured.table_of(DEVICE)) == {KEY, ours, theirs}


def test_switched_off(monkeypatch):
    monkeypatch.setattr(config, "CACHE", None)
    measured.forget()
    assert measured.record(DEVICE, KEY, TIMINGS) is None
    assert measured.table_of(DEVICE) == {KEY: TIMINGS}  # for this process
    measured.forget()
    assert measured.table_of(DEVICE) == {}


def edited(**changes):
    return lambda content: json.dumps({**content, **changes})


def with_row(**changes):
    return lambda content: json.dumps({**content, "rows": [{**content["rows"][0], **changes}]})


DAMAGE = {
    "empty": lambda content: "",
    "cut off": lambda content: json.dumps(content)[:200],
    "a list": lambda content: "[]",
    "no rows": lambda content: json.dumps({n: v for n, v in content.items() if n != "rows"}),
    "rows of another kind": edited(rows=[1]),
    "no ways": with_row(ways=None),
    "direction": with_row(direction="sideways"),
    "size": with_row(M="64"),
    "zero time": with_row(ways={"torch/library": {"us": 0}}),
    "no time": with_row(ways={"torch/library": {}}),
    "tile of text": with_row(ways={"torch/library": {"us": 1, "tiles": {"shrink": {"block_m": "64"}}}}),
    "tile of another size": with_row(ways={"torch/library": {"us": 1, "tiles": {"shrink": {"block_m": 100}}}}),
    "tile too narrow": with_row(ways={"triton/one_pass": {"us": 1, "tiles": {"one_pass": {"block_r": 8}}}}),
    "unknown tile field": with_row(ways={"torch/library": {"us": 1, "tiles": {"shrink": {"block_q": 1}}}}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_ignored_with_one_warning_and_written_anew(cache, damage):
    path = measured.record(DEVICE, KEY, TIMINGS)
    path.write_text(DAMAGE[damage](json.loads(path.read_text())))
    measured.forget()
    with pytest.warns(RuntimeWarning, match=r"plans-nvidia-test-9000.json cannot be read .*: ignored") as caught:
        found = measured.table_of(DEVICE), measured.table_of(DEVICE)
    assert found == ({}, {})
    assert len(caught) == 1
    with pytest.warns(RuntimeWarning, match="cannot be read"):
        measured.record(DEVICE, KEY, TIMINGS)
    measured.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measured.table_of(DEVICE) == {KEY: TIMINGS}


@pytest.mark.parametrize("field", ["format", "device", "code", "torch", "triton"])
def test_a_file_from_another_version_is_ignored_with_one_warning(cache, field):
    path = measured.record(DEVICE, KEY, TIMINGS)
    path.write_text(edited(**{field: "another"})(json.loads(path.read_text())))
    measured.forget()
    with pytest.warns(RuntimeWarning, match=f"was tuned for {field} 'another', not .*lora-kernels tune"):
        assert measured.table_of(DEVICE) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measured.table_of(DEVICE) == {}


def test_a_write_that_fails_leaves_the_old_file(cache, monkeypatch):
    path = measured.record(DEVICE, KEY, TIMINGS)
    before = path.read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        measured.record(DEVICE, KEY._replace(M=128), TIMINGS)
    assert path.read_bytes() == before
    assert [file.name for file in cache.iterdir()] == [path.name]


PROBLEMS = st.builds(
    Problem,
    M=st.sampled_from([1, 16, 64, 100, 8192]),
    N=st.sampled_from([1024, 4096, 14336]),
    K=st.sampled_from([1024, 4096]),
    R=st.sampled_from([1, 16, 64, 256]),
    dtype=st.just(torch.bfloat16),
    adapter_dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    dropout=st.booleans(),
    arch=st.sampled_from(["sm_80", "sm_90", "sm_100", "gfx942"]),
    device_type=st.just("cuda"),
    sm_count=st.just(132),
)


@given(PROBLEMS, st.data())
def test_the_planner_never_picks_what_its_table_says_is_slower(problem, data):
    table = {}
    for direction in DIRECTIONS:
        ways = ways_of(problem, direction, ("torch", "triton"))
        times = data.draw(st.lists(st.floats(1.0, 1e4), min_size=len(ways), max_size=len(ways)), label=direction)
        table[problem.key(direction)] = {str(way): Timing(us) for way, us in zip(ways, times, strict=True)}
    told = make_plan(problem, "auto", triton_available=True, measured=table)
    assert told.measured
    for direction, way in (("forward", Way(told.backend, told.strategy)), ("backward", told.backward)):
        times = table[problem.key(direction)]
        assert times[str(way)].us == min(timing.us for timing in times.values())


def test_a_measured_way_brings_its_tiles():
    table = {HOPPER.key("forward"): TIMINGS, HOPPER.key("backward"): {"triton/fused": TIMINGS["triton/shrink_fused"]}}
    told = make_plan(HOPPER, "auto", triton_available=True, measured=table)
    assert (told.backend, told.strategy, told.backward) == ("triton", "shrink_fused", Way("triton", "fused"))
    assert told.tile("gemm_expand") == told.tile("gemm_expand", backward=True) == TILE
    assert "measured on this device: triton/shrink_fused 21.25 us, torch/library 30.5 us" in told.reason
    assert dict(told.costs) == {"triton/shrink_fused": 21.25, "torch/library": 30.5}
    own = replace(TILE, block_m=32)
    table[HOPPER.key("backward")] = {"triton/fused": Timing(1.0, (("gemm_expand", own),))}
    told = make_plan(HOPPER, "auto", triton_available=True, measured=table)
    assert (told.tile("gemm_expand"), told.tile("gemm_expand", backward=True)) == (TILE, own)


def test_a_named_backend_is_honoured_whatever_was_measured():
    table = {HOPPER.key("forward"): TIMINGS}
    assert make_plan(HOPPER, "torch", triton_available=True, measured=table).backend == "torch"


def test_a_folder_that_may_not_be_read_is_ignored_with_one_warning(cache, monkeypatch):
    read, exists = Path.read_text, Path.exists

    def guarded(real):
        def method(self, *arguments, **options):
            if self.name.startswith("plans-"):
                raise PermissionError(13, "Permission denied")
            return real(self, *arguments, **options)

        return method

    monkeypatch.setattr(Path, "read_text", guarded(read))
    monkeypatch.setattr(Path, "exists", guarded(exists))
    with pytest.warns(RuntimeWarning, match="cannot be read .PermissionError"):
        assert explain_plan(200, 64, 64, 8, dtype=torch.float32, device="cpu").backend == "torch"


def test_what_was_tuned_forward_is_no_news_of_the_backward():
    planned = make_plan(HOPPER, "triton", triton_available=True)
    tuned = replace(TILE, block_m=32)
    table = {HOPPER.key("forward"): {"triton/shrink_fused": Timing(1.0, (("gemm_expand", tuned),))}}
    told = make_plan(HOPPER, "triton", triton_available=True, measured=table)
    assert told.tile("gemm_expand") == tuned != planned.tile("gemm_expand")
    for kernel in dict(planned.tiles):
        if not kernel.startswith("backward."):
            assert told.tile(kernel, backward=True) == planned.tile(kernel, backward=True)


def test_times_under_tf32_are_others():
    assert replace(HOPPER, tf32=True).key("forward") != HOPPER.key("forward")


def test_a_measured_way_that_cannot_serve_is_not_taken():
    table = {HOPPER.key("forward"): {"triton/persistent": Timing(0.1), "torch/library": Timing(9.0)}}
    told = make_plan(replace(HOPPER, arch="sm_80"), "auto", triton_available=True, measured=table)
    assert (told.backend, told.strategy) == ("torch", "library")


def test_auto_on_the_cpu_follows_what_was_tuned(cache):
    from lora_kernels.planning.device import device_traits

    name = device_traits("cpu", None).name
    key = Key("forward", 256, 64, 64, 8, "bfloat16", "bfloat16", False, False)
    for faster, slower in (("library", "upcast"), ("upcast", "library")):
        measured.record(name, key, {f"torch/{faster}": Timing(1.0), f"torch/{slower}": Timing(2.0)})
        told = explain_plan(200, 64, 64, 8, dtype=torch.bfloat16, device="cpu")
        assert (told.strategy, told.measured) == (faster, True)
