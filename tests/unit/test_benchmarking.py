"""The measuring tools themselves: interleaving, ratios, bytes, records, and a gate that turns wrong results away."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import subprocess
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora_kernels.benchmarking import cases as suites, records as rows_of, runner
from lora_kernels.benchmarking.cases import LinearCase
from lora_kernels.benchmarking.gate import Gate
from lora_kernels.benchmarking.load import ForeignLoad, contention
from lora_kernels.benchmarking.memory import peak_bytes, saved_bytes
from lora_kernels.benchmarking.providers import (
    FROZEN_LINEAR,
    PROVIDERS,
    TORCH,
    TRITON,
    UNFUSED_CHAIN,
    CaseInputs,
    Provider,
)
from lora_kernels.benchmarking.records import Environment, Record, device_slug, write_csv, write_json
from lora_kernels.benchmarking.report import Table, by_case, case_of, summarise
from lora_kernels.benchmarking.runner import CALLS, run_case, shortened
from lora_kernels.benchmarking.timer import Samples, Summary, interleave, planned_rounds, round_order
from lora_kernels.planning.device import cpu_name

CPU = torch.device("cpu")
SMALL = LinearCase("small", "none", 48, 40, 24, R=4)
ENVIRONMENT = Environment.current(CPU)


def test_every_round_calls_every_contender_once_in_a_rotating_order() -> None:
    calls: list[str] = []
    contenders = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    samples = interleave(contenders, device=CPU, rounds=6, warmup=0)
    rounds = ["".join(calls[start : start + 3]) for start in range(0, 18, 3)]
    assert rounds == ["abc", "bca", "cab", "cba", "acb", "bac"]
    assert samples.rounds == 6
    assert set(samples.ms) == set("abc")


def test_over_two_turns_each_contender_follows_every_other() -> None:
    orders = [round_order("abc", index) for index in range(6)]
    followed = {(first, second) for order in orders for first, second in itertools.pairwise(order)}
    assert len(followed) == 6


def test_warmup_is_not_timed() -> None:
    calls: list[int] = []
    samples = interleave({"a": lambda: calls.append(1)}, device=CPU, rounds=2, warmup=3)
    assert (len(calls), samples.rounds) == (5, 2)


def test_times_go_to_their_own_contender() -> None:
    def slow() -> None:
        torch.ones(512, 512) @ torch.ones(512, 512)

    samples = interleave({"fast": lambda: None, "slow": slow}, device=CPU, rounds=6)
    assert samples.time("fast").median < samples.time("slow").median


@pytest.mark.parametrize(("round_s", "wanted"), [(10.0, 3), (0.5, 6), (0.1, 12), (1e-6, 60), (0.0, 60)])
def test_planned_rounds_fill_the_budget_with_whole_rotations(round_s: float, wanted: int) -> None:
    assert planned_rounds(round_s, 3, budget_s=1.1, minimum=6, maximum=60) == wanted


@pytest.mark.parametrize(
    ("row_s", "rows"),
    [(1e-6, 1024), (8e-4, 256), (5e-3, 32), (1.0, 32)],
    ids=["a library that multiplies", "slow", "slower", "as slow as it may be"],
)
def test_a_case_gets_the_rows_that_the_slowest_product_leaves_time_for(monkeypatch, row_s: float, rows: int) -> None:
    probed: list[int] = []

    def call_s(case: LinearCase, device: torch.device) -> float:
        probed.append(case.M)
        return row_s * case.M

    monkeypatch.setattr(runner, "_frozen_call_s", call_s)
    case = dataclasses.replace(SMALL, M=1024)
    found = shortened(case, 5, device=CPU, limit_s=10.0)
    assert found == dataclasses.replace(case, M=rows)
    assert probed == ([32] if rows == 1024 else [32, 256])  # the second, before rows are taken away
    assert rows == 32 or row_s * rows * 5 * CALLS <= 10.0
    few = dataclasses.replace(SMALL, M=16)
    assert shortened(few, 5, device=CPU, limit_s=0.0) == few


def test_what_costs_on_the_first_calls_alone_takes_no_rows_away(monkeypatch) -> None:
    monkeypatch.setattr(runner, "_frozen_call_s", lambda case, device: 0.1 + 1e-6 * case.M)
    case = dataclasses.replace(SMALL, M=1024)
    assert shortened(case, 5, device=CPU, limit_s=20.0) == case


def test_all_contenders_of_a_case_with_fewer_rows_have_the_same_and_say_how_many_were_asked_for(monkeypatch) -> None:
    monkeypatch.setattr(runner, "_frozen_call_s", lambda case, device: 1.0 * case.M)
    case = dataclasses.replace(SMALL, M=512)
    providers = (FROZEN_LINEAR, UNFUSED_CHAIN, TORCH)
    limited = run_case(case, providers, device=CPU, environment=ENVIRONMENT, rounds=2, limit_s=1.0)
    assert [(r.M, r.M_asked, r.shortened, r.timed) for r in limited] == [(32, 512, True, True)] * 3
    whole = run_case(case, providers, device=CPU, environment=ENVIRONMENT, rounds=2)
    assert [(r.M, r.M_asked, r.shortened) for r in whole] == [(512, 512, False)] * 3
    assert not any(dataclasses.replace(r, M_asked=0).shortened for r in whole)  # rows from before the column


def test_no_contender_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one contender; got none"):
        interleave({}, device=CPU)


def test_ratios_are_paired_inside_a_round() -> None:
    # The machine halves its speed after every round; each ratio is 2 all the same.
    samples = Samples({"slow": (2.0, 4.0, 8.0, 16.0), "fast": (1.0, 2.0, 4.0, 8.0)})
    assert samples.ratio("slow", "fast") == Summary(2.0, 2.0, 2.0)


def test_summary_interpolates_percentiles() -> None:
    summary = Summary.of([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (summary.median, summary.p10, summary.p90) == (3.0, pytest.approx(1.4), pytest.approx(4.6))
    assert Summary.of([7.0]) == Summary(7.0, 7.0, 7.0)


def test_saved_bytes_equal_a_hand_count() -> None:
    x = torch.randn(6, 8, requires_grad=True)
    w = torch.randn(8, 10, requires_grad=True)

    def forward() -> Tensor:
        return (x @ w).sigmoid()

    # The product saves x and w, which are alive anyway; sigmoid saves its output [6, 10] and nothing else.
    assert saved_bytes(forward, beyond=(x, w)) == 6 * 10 * 4
    assert saved_bytes(forward) == (6 * 10 + 6 * 8 + 8 * 10) * 4


def test_saved_bytes_count_a_storage_once() -> None:
    x = torch.randn(16, requires_grad=True)

    def forward() -> Tensor:
        middle = x.exp()  # saved by exp, by the square and, as a view, by the product
        return (middle * middle.view(4, 4).view(16)).square()

    assert saved_bytes(forward, beyond=(x,)) == 2 * 16 * 4


@pytest.mark.aligned  # what is counted is the allocator's
def test_peak_bytes_equal_a_hand_count() -> None:
    x = torch.zeros(1024, 256)

    def three_alive_at_most() -> Tensor:
        first = x.clone()
        second = first.clone()
        third = second.clone()
        del first, second
        return third.clone()

    assert peak_bytes(three_alive_at_most, device=CPU) == 3 * 2**20


@pytest.mark.parametrize("adapter_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("mode", suites.MODES)
def test_gate_lets_right_providers_pass(adapter_dtype: str, dropout_p: float, mode: suites.Mode) -> None:
    case = dataclasses.replace(SMALL, dtype="bfloat16", adapter_dtype=adapter_dtype, dropout_p=dropout_p, mode=mode)
    gate = Gate(case, CaseInputs.of(case, CPU))
    for provider in (FROZEN_LINEAR, UNFUSED_CHAIN, TORCH):
        verdict = gate.check(provider)
        assert verdict.passed, f"{provider.name}: {verdict.reason}"


def _wrong_scaling(inputs: CaseInputs, dropout_p: float) -> Tensor:
    return TORCH.forward(dataclasses.replace(inputs, scaling=inputs.scaling * 1.001), dropout_p)


def _wrong_gradient(inputs: CaseInputs, dropout_p: float) -> Tensor:
    y = TORCH.forward(inputs, dropout_p)
    return y + (inputs.lora_B - inputs.lora_B.detach()).sum()  # adds exactly nothing, but not to the gradient


def _not_a_number(inputs: CaseInputs, dropout_p: float) -> Tensor:
    return TORCH.forward(inputs, dropout_p) * math.nan


def _ignores_dropout(inputs: CaseInputs, dropout_p: float) -> Tensor:
    return TORCH.forward(inputs, 0.0)


@pytest.mark.parametrize(
    ("forward", "dropout_p", "tensor"),
    [
        (_wrong_scaling, 0.0, "y"),
        (_wrong_gradient, 0.0, "d_lora_B"),
        (_not_a_number, 0.0, "y"),
        (_ignores_dropout, 0.1, "y"),
    ],
)
def test_gate_refuses_a_wrong_provider_and_no_time_is_recorded(forward, dropout_p: float, tensor: str) -> None:
    wrong = Provider("wrong", forward, seeded_mask=True)
    case = dataclasses.replace(SMALL, dropout_p=dropout_p)
    records = run_case(case, (UNFUSED_CHAIN, wrong), device=CPU, environment=ENVIRONMENT, rounds=2)
    unfused, refused = records
    assert unfused.timed
    assert refused.fault == "refused"
    assert refused.worst_tensor == tensor
    assert (refused.median_ms, refused.speedup, refused.rounds) == (None, None, 0)
    row = Table(["unfused chain", "wrong"]).row(case, by_case(records)[case])
    assert f"wrong refused: {tensor}: relative error" in row


def test_triton_is_unavailable_without_a_gpu_and_says_why() -> None:
    (record,) = run_case(SMALL, (TRITON,), device=CPU, environment=ENVIRONMENT, rounds=1)
    assert record.status.startswith("unavailable: needs a GPU")
    assert not record.timed
    assert not record.fault


def _out_of_memory(inputs: CaseInputs, dropout_p: float) -> Tensor:
    raise torch.OutOfMemoryError("tried to allocate 1 PiB\nand a long trace")


def _without_graph_only(inputs: CaseInputs, dropout_p: float) -> Tensor:
    """Passes the gate, which leaves autograd on, and fails when a forward is timed."""
    if not torch.is_grad_enabled():
        raise RuntimeError("timed out of luck")
    return TORCH.forward(inputs, dropout_p)


@pytest.mark.parametrize(
    ("forward", "status", "checked"),
    [
        (_out_of_memory, "failed: OutOfMemoryError: tried to allocate 1 PiB", False),
        (_without_graph_only, "failed: RuntimeError: timed out of luck", True),
    ],
)
def test_a_contender_that_raises_is_a_record_and_the_others_are_timed(forward, status: str, checked: bool) -> None:
    case = dataclasses.replace(SMALL, mode="forward")
    contenders = (UNFUSED_CHAIN, Provider("raises", forward), TORCH)
    records = run_case(case, contenders, device=CPU, environment=ENVIRONMENT, rounds=2)
    unfused, raised, ours = records
    assert (raised.status, raised.fault, raised.timed) == (status, "failed", False)
    assert (raised.error is not None) == checked
    assert unfused.timed
    assert ours.speedup is not None
    assert f"raises {status}" in Table(["raises", "torch"]).row(case, by_case(records)[case])


def test_operands_that_do_not_fit_fail_every_contender(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(case: LinearCase, device: torch.device) -> CaseInputs:
        raise torch.OutOfMemoryError("tried to allocate 1 PiB")

    monkeypatch.setattr(CaseInputs, "of", too_large)
    records = run_case(SMALL, PROVIDERS, device=CPU, environment=ENVIRONMENT, rounds=1)
    assert [record.fault for record in records] == ["failed", "failed", "failed", ""]  # the last one needs a GPU


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return run_case(SMALL, PROVIDERS, device=CPU, environment=ENVIRONMENT, rounds=3)


def test_records_survive_the_round_trip(records: list[Record], tmp_path: Path) -> None:
    write_csv(records, tmp_path / "new" / "records.csv")
    write_json(records, tmp_path / "new" / "records.json")
    rows = [dataclasses.asdict(record) for record in records]
    with (tmp_path / "new" / "records.csv").open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert found == [{name: "" if cell is None else str(cell) for name, cell in row.items()} for row in rows]
    assert json.loads((tmp_path / "new" / "records.json").read_text()) == rows
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["records.csv", "records.json"]
    assert case_of(records[0]) == SMALL


def test_records_hold_ratio_error_and_bytes(records: list[Record]) -> None:
    by_provider = {record.provider: record for record in records}
    assert by_provider["unfused chain"].speedup == 1
    assert by_provider["frozen linear"].cost == 1
    ours = by_provider["torch"]
    assert ours.error is not None
    assert ours.error_budget is not None
    assert ours.error <= ours.error_budget
    assert ours.saved_bytes == SMALL.M * SMALL.R * 4  # xa, and neither a mask nor anything of y's size


def test_summary_is_over_long_training_cases_without_dropout(records: list[Record]) -> None:
    template = next(record for record in records if record.provider == "torch")
    assert summarise(records, "torch", "float32") is None  # 48 tokens are too few to count
    long = [
        dataclasses.replace(template, M=1024, name=name, speedup=speedup)
        for name, speedup in (("a", 0.9), ("b", 1.1), ("c", 1.3))
    ]
    dropped = dataclasses.replace(template, M=1024, name="d", speedup=9.0, dropout_p=0.1)
    summary = summarise([*long, dropped], "torch", "float32")
    assert summary is not None
    assert (summary.cases, summary.median, summary.slower) == (3, 1.1, ("a",))
    assert "MISSED" in summary.line(1.2)
    assert "met" in summary.line(1.05)


@pytest.mark.parametrize("suite", [suites.cpu_suite(), suites.gpu_suite()])
def test_suite_cases_are_distinct_and_selectable(suite: tuple[LinearCase, ...]) -> None:
    assert len(set(suite)) == len(suite)
    dropped = suites.select(suite, "bf16 p=0.1")
    assert dropped
    assert all(case.dropout_p == 0.1 and case.dtype == "bfloat16" for case in dropped)
    assert suites.select(suite, "no such case") == ()


def test_dtype_is_spelled_as_torch_does() -> None:
    with pytest.raises(ValueError, match="must be a torch dtype's name such as 'bfloat16'; got 'bf16'"):
        _ = dataclasses.replace(SMALL, dtype="bf16").torch_dtype


def test_a_busy_machine_is_told_apart_from_a_quiet_one() -> None:
    assert contention(0.1, threads=2, cores=2) is None
    assert contention(30.0, threads=2, cores=64) is None  # busy elsewhere, with room for us
    warning = contention(1.3, threads=2, cores=2)
    assert warning is not None
    assert "kept 1.3 of 2 cores busy while 2 threads were timed" in warning


def test_own_work_is_not_foreign_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_kernels.benchmarking.load._busy_seconds", lambda: None)
    assert ForeignLoad().warning() is None  # no /proc/stat: nothing is known, nothing is said
    clock = iter((100.0, 160.0))
    own = iter((10.0, 70.0))
    monkeypatch.setattr("lora_kernels.benchmarking.load._busy_seconds", lambda: next(clock))
    monkeypatch.setattr("lora_kernels.benchmarking.load._own_seconds", lambda: next(own))
    assert ForeignLoad().warning() is None  # all sixty seconds were ours


def test_a_copy_of_the_tree_is_told_its_commit_and_a_gpu_has_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    # A lent machine gets the files without their history, and rows without a driver are taken for a CPU's.
    monkeypatch.setattr(rows_of.config, "COMMIT", "abc123")
    monkeypatch.setattr(rows_of, "_output", lambda command: "")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    there = Environment.current(torch.device("cuda"))
    assert (there.commit, there.driver) == ("abc123", "unknown")
    monkeypatch.setattr(rows_of, "_output", lambda command: "0123" if "rev-parse" in command else "")
    assert Environment.current(torch.device("cpu")).commit == "abc123"  # git may know another history there
    monkeypatch.setattr(rows_of.config, "COMMIT", "")
    assert Environment.current(torch.device("cpu")).commit == "0123"


def test_a_command_that_hangs_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command, **_):
        raise subprocess.TimeoutExpired(command, 20)

    monkeypatch.setattr(rows_of.subprocess, "run", hang)
    assert rows_of._output(["git", "--version"]) == ""


def test_a_cpus_name_tells_its_instructions_and_folders_of_two_kinds_differ(monkeypatch) -> None:
    names = {}
    for kind, capabilities in {
        "old": {"sse4_2": True},
        "avx2": {"avx2": True},
        "avx-512": {"avx2": True, "avx512_f": True},
        "amx": {"avx2": True, "avx512_f": True, "avx512_bf16": True, "amx_bf16": True},
    }.items():
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=capabilities: known, raising=False)
        cpu_name.cache_clear()
        names[kind] = device_slug(CPU)
        assert Environment.current(CPU).device == cpu_name()
    cpu_name.cache_clear()
    assert len(set(names.values())) == 4
    endings = ["", "-avx2", "-avx-512", "-avx-512-bf16-amx"]
    threads = f"-{torch.get_num_threads()}-threads"
    assert list(names.values()) == [names["old"].removesuffix(threads) + ending + threads for ending in endings]


# -- what only a GPU has, with the GPU taken out -----------------------------------------------------------------------


def test_host_time_is_the_median_of_a_few_calls_between_two_waits(monkeypatch):
    told = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: told.append("wait"))
    us = runner._host_us(lambda: told.append("call") or time.sleep(0.002), torch.device("cuda"))
    assert told == ["wait", *["call"] * runner.HOST_CALLS, "wait"]
    assert 2_000 <= us < 200_000


def test_what_cannot_be_captured_is_left_out_of_the_graphs(monkeypatch):
    def captured(call, device):
        if call is refused:
            raise RuntimeError("operation not permitted when stream is capturing")
        return call

    def refused():
        pytest.fail("timed without its graph")

    monkeypatch.setattr(runner, "_captured", captured)
    samples = runner._in_graphs({"ours": lambda: None, "theirs": refused}, torch.device("cpu"), 0.01)
    assert set(samples.ms) == {"ours"}
