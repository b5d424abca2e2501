"""Pages from rows: they are what the rows say, bad news included, and targets are judged by the rows they name."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import comparison, finetune, host, kernels, linear, llama_step, providers, report, suites, targets
from bench.benchmark_json import write_benchmark_json
from bench.peft_layers import PATCHED, STOCK
from lora_kernels.benchmarking.cases import LinearCase
from lora_kernels.benchmarking.providers import FROZEN, UNFUSED
from lora_kernels.benchmarking.records import Environment, Record, read_csv, write_csv
from lora_kernels.benchmarking.roofline import Ceilings, floor_ms, measure_ceilings, work
from lora_kernels.benchmarking.runner import run_case
from lora_kernels.benchmarking.timer import Samples

CPU = torch.device("cpu")
SMALL = LinearCase("small", "none", 48, 40, 24, R=4)
CEILINGS = Ceilings(copy_gb_s=10.0, gemm_tflops={"float32": 0.1, "bfloat16": 0.1})


@pytest.fixture(scope="module")
def template() -> Record:
    environment = Environment.current(CPU)
    (record,) = run_case(SMALL, (providers.AUTO,), device=CPU, environment=environment, rounds=1)
    return record


def row(template: Record, case: LinearCase, provider: str, ms: float, frozen_ms: float = 1.0, **changed) -> Record:
    fields = dataclasses.asdict(case) | {"M_asked": case.M, "provider": provider}
    fields |= {"median_ms": ms, "cost": ms / frozen_ms} | changed
    return dataclasses.replace(template, **fields)


def rows(template: Record, cases, times: dict[str, float], **changed) -> list[Record]:
    return [
        row(template, case, name, ms, times.get(FROZEN, 1.0), **changed) for case in cases for name, ms in times.items()
    ]


@pytest.mark.parametrize("path", sorted(report.pages()), ids=lambda path: path.stem)
def test_committed_pages_say_what_the_committed_rows_say(path: Path) -> None:
    assert path.exists(), "run `make pages`"
    assert path.read_text(encoding="utf-8") == report.pages()[path], "run `make pages`"


def test_every_page_has_rows_and_is_listed() -> None:
    index = (report.PAGES / "README.md").read_text(encoding="utf-8")
    for path in report.PAGES.glob("*.md"):
        if path.name != "README.md":
            assert path in report.pages()
            assert f"({path.name})" in index


def test_check_tells_a_stale_page(tmp_path: Path, monkeypatch, capsys) -> None:
    path = tmp_path / "page.md"
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "pages", lambda: {path: "new\n"})
    assert report.main(["--check"]) == 1
    assert "page.md" in capsys.readouterr().err
    assert report.main([]) == 0
    assert report.main(["--check"]) == 0
    assert path.read_text() == "new\n"


def test_a_page_lists_what_loses_before_the_table(template: Record, tmp_path: Path) -> None:
    case = dataclasses.replace(SMALL, name="loser")
    found = rows(template, [case], {FROZEN: 1.0, UNFUSED: 2.0, "addmm": 1.1, "auto": 1.21})
    failed = row(template, case, "peft", 0.0, status="failed: RuntimeError: no")
    write_csv([*found, dataclasses.replace(failed, median_ms=None)], tmp_path / "linear.csv")
    (tmp_path / "run.json").write_text(
        json.dumps({"ceilings": {"copy_gb_s": 5.0, "gemm_tflops": {"float32": 0.1}}, "cases": 1, "left_out": ["more"]})
    )
    text = report.page(tmp_path)
    assert "In 1 of 2 comparisons (with `unfused chain`, `addmm`) a contender was faster" in text
    assert "`addmm` is 1.100x as fast" in text
    assert "`peft` failed: RuntimeError: no" in text
    assert text.index("When it loses") < text.index("Side by side")
    assert "for want of time, 1 of 2 cases" in text
    assert "copy 5 GB/s" in text


def test_fine_tuning_is_compared_step_by_step(template: Record, tmp_path: Path) -> None:
    write_csv(rows(template, [SMALL], {FROZEN: 1.0, "auto": 1.1}), tmp_path / "linear.csv")
    assert "## Fine-tuning" not in report.page(tmp_path)
    arms = (finetune.PEFT, finetune.PATCHED)
    titles = ["step", *(f'"loss, {arm}"' for arm in arms), *(f'"ms, {arm}"' for arm in arms)]
    # The first step is not timed. Ratios within the steps are 0.8, 0.5 and 0.9.
    steps = ["0,2.0,2.0,,", "1,1.5,1.5,10.0,8.0", "2,1.0,1.25,12.0,6.0", "3,0.5,0.5,10.0,9.0"]
    (tmp_path / "finetune.csv").write_text("\n".join([",".join(titles), *steps, ""]))
    text = report.page(tmp_path)
    assert "4 steps, 3 of them timed" in text
    assert "| `patch_peft` | 8.0 | 0.800 (0.56–0.88) | 0.500000 | 2.5e-01 |" in text


def test_of_a_kernel_the_fastest_tile_is_shown(template: Record, tmp_path: Path) -> None:
    write_csv(rows(template, [SMALL], {FROZEN: 1.0, "auto": 1.1}), tmp_path / "linear.csv")
    names = ("device", "driver", "torch", "triton", "commit", "date")
    where = {name: getattr(template, name) for name in names}
    found = [
        kernels.KernelRow("shrink 8x4", name, "ok" if us else "failed", us, us, us, us, 1.5, 0.0, **where)
        for name, us in (("library", 3.0), ("shrink a", 4.0), ("shrink b", 2.0), ("shrink c", None))
    ]
    write_csv(found, tmp_path / "kernels.csv")
    text = report.page(tmp_path)
    assert "| shrink 8x4 | 1.5 | `shrink b` 2.0 (2.0–2.0); `library` 3.0 (3.0–3.0) |" in text


def test_what_a_gpu_alone_leaves_has_its_sections(template: Record, tmp_path: Path) -> None:
    write_csv(rows(template, [SMALL], {FROZEN: 1.0, "auto": 1.1}), tmp_path / "linear.csv")
    assert "## A Llama-shaped training step" not in report.page(tmp_path)
    names = ("device", "driver", "torch", "triton", "peft", "commit", "date")
    where = {name: getattr(template, name) for name in names}
    steps = [
        llama_step.LlamaRow(
            "8b-layers", 4, 8192, 16, "fp32", False, p, False, name, 6, ms, ms, ms, ratio, ratio, ratio,
            peak_bytes=3 << 20, saved_bytes=None, error=1e-3, error_budget=2e-3, **where,
        )
        for p, patched_ms in ((0.05, 80.0), (0.0, 125.0))
        for name, ms, ratio in ((STOCK, 100.0, 1.0), (PATCHED, patched_ms, 100.0 / patched_ms))
    ]  # fmt: skip
    write_csv(steps, tmp_path / "llama_step.csv")
    text = report.page(tmp_path)
    llama = text[text.index("## A Llama-shaped training step") :]
    assert "4 Llama layers (`--size 8b-layers`), 8192 tokens, adapters of rank 16" in llama
    assert "1 of 2 cases are slower patched" in llama
    assert "Without a row, left out or failed: fp32 adapters autocast p=0.05, " in llama
    faster = "| fp32 adapters p=0.05 | 100.0 | 80.0 | 1.250x (1.25–1.25) | 3.00 MiB, 3.00 MiB | 1.0e-03 of 2.0e-03 |"
    assert llama.index("| fp32 adapters p=0 | 100.0 | 125.0 | 0.800x") < llama.index(faster)


def test_losses_are_sorted_and_own_strategies_are_no_rivals(template: Record) -> None:
    slow, slower = (dataclasses.replace(SMALL, name=name) for name in ("slow", "slower"))
    found = rows(template, [slow], {FROZEN: 1, "auto": 1.2, "addmm": 1.1, "torch:library": 0.5})
    found += rows(template, [slower], {FROZEN: 1, "auto": 1.6, "addmm": 1.1})
    assert [(loss.case.name, loss.rival) for loss in comparison.losses(found)] == [
        ("slower", "addmm"),
        ("slow", "addmm"),
    ]


LAYER = [
    case
    for case in suites.suite("headline")
    if case.backward and not case.dropout_p and case.adapter_dtype == "bfloat16"
]
GPU = {"driver": "1.2", "device": "a GPU"}


def verdicts(records: list[Record], host_rows=()) -> dict[str, tuple[str, str]]:
    table = targets.table(targets.Evidence.of(records, host_rows))
    return {what.split(": ", 1)[-1] if "layer," in what else what: (found, met) for what, _, found, met in table}


def test_a_layer_is_the_sum_of_its_seven_linears(template: Record) -> None:
    found = rows(
        template, LAYER, {FROZEN: 1.0, "addmm": 1.2, "torch.compile": 1.3, "compile-max": 1.25, "auto": 1.05}, **GPU
    )
    judged = verdicts(found)
    assert judged["over the frozen layer"] == ("1.050x", "met")
    assert judged["cuBLAS + addmm_ over ours"] == ("1.143x", "met")
    assert judged["torch.compile of the unfused layer, the better mode timed, over ours"] == ("1.190x", "met")
    assert judged["cuBLAS + addmm_ over ours, the least of all shapes, p = 0"] == ("1.143x", "met")


def test_shared_shapes_count_twice(template: Record) -> None:
    found = [
        row(template, case, name, (2.0 if "gate" in case.name and name == "auto" else 1.0), **GPU)
        for case in LAYER
        for name in (FROZEN, "auto")
    ]
    assert verdicts(found)["over the frozen layer"] == (f"{9 / 7:.3f}x", "MISSED")


def test_a_layer_with_a_linear_missing_is_not_measured(template: Record) -> None:
    found = rows(template, LAYER[:-1], {FROZEN: 1.0, "auto": 1.05}, **GPU)
    assert verdicts(found)["over the frozen layer"] == ("", "not measured")


def test_decode_takes_every_shape_and_the_worst(template: Record) -> None:
    cases = [case for case in suites.suite("headline") if case.graph]
    name = "Decode, M = 1, 16, 64, CUDA graph, r = 16: over frozen, the worst Llama-3-8B linear"
    assert verdicts(rows(template, cases, {FROZEN: 1.0, "auto": 1.04}, **GPU))[name] == ("1.040x", "met")
    assert verdicts(rows(template, cases[1:], {FROZEN: 1.0, "auto": 1.04}, **GPU))[name][1] == "not measured"


def test_what_is_kept_is_judged_beyond_xa(template: Record) -> None:
    case = dataclasses.replace(SMALL, dropout_p=0.1)
    name = "Kept for backward beyond x and xa, the most of all cases"
    xa, x = 4 * 48 * 4, 4 * 48 * 24
    assert verdicts(rows(template, [case], {"auto": 1.0}, saved_bytes=xa + 8))[name] == ("0.0000 of x", "met")
    assert verdicts(rows(template, [case], {"auto": 1.0}, saved_bytes=xa + 8 + x))[name] == ("1.0000 of x", "MISSED")


def test_host_time_is_judged_on_a_gpu(template: Record) -> None:
    name = "GPU: host time per forward + backward, over the same autograd.Function doing nothing"
    timed = host.HostRow("lora_linear", 0.0, 80.0, 70.0, 90.0, 24.0, "a GPU", "", "", "", "", "")
    assert verdicts(rows(template, [SMALL], {"auto": 1.0}, **GPU), [timed])[name] == ("24.0 µs", "met")
    assert verdicts(rows(template, [SMALL], {"auto": 1.0}), [timed])[name] == ("", "not measured")


def test_rows_of_before_are_read(tmp_path: Path, template: Record) -> None:
    write_csv([template], tmp_path / "new.csv")
    assert read_csv(tmp_path / "new.csv", Record) == [template]
    (old, *_) = read_csv(report.folders()[0] / "linear.csv", Record)
    assert old.timed
    assert isinstance(old.graph, bool)


def test_pytest_benchmark_reads_the_interleaved_samples(template: Record, tmp_path: Path) -> None:
    records = rows(template, [SMALL], {FROZEN: 1.0, "auto": 2.0})
    samples = {SMALL: Samples({FROZEN: (1.0, 1.1, 0.9, 1.0), "auto": (2.0, 2.1, 1.9, 2.0)})}
    path = tmp_path / "linear_benchmark.json"
    write_benchmark_json(records, samples, path)
    command = [sys.executable, "-m", "pytest_benchmark", "compare", str(path), "--group-by=group", "--csv=found.csv"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "auto[small-M48-r4-fp32-p0-forward+backward]" in done.stdout + (tmp_path / "found.csv").read_text()
    (first, _) = json.loads(path.read_text())["benchmarks"]
    assert first["stats"]["median"] == pytest.approx(1e-3)
    assert first["extra_info"]["provider"] == FROZEN


def test_suites_run_as_pytest_benchmarks(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    command = [
        sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider", "--benchmark-only",
        "--only", "minilm.attention fp32", "--providers", "unsloth-style,auto", "--benchmark-max-time=0.05",
        "--benchmark-min-rounds=1", f"--benchmark-json={path}",
    ]  # fmt: skip
    # Run by a worker of pytest-xdist, it would take itself for one, and pytest-benchmark does not time on those.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    subprocess.run(command, cwd=report.ROOT, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(path.read_text())["benchmarks"]
    assert [benchmark["name"].rpartition("-")[2] for benchmark in found] == ["style]", "auto]"]
    assert {benchmark["group"] for benchmark in found} == {"minilm.attention-M2048-r16-fp32-p0-forward+backward"}
    assert all(benchmark["extra_info"]["error"] <= benchmark["extra_info"]["error_budget"] for benchmark in found)


def test_ceilings_are_sane() -> None:
    ceilings = measure_ceilings(CPU, ["float32"], budget_s=0.02, size=256)
    assert 0.1 < ceilings.copy_gb_s < 10_000
    assert 1e-4 < ceilings.gemm_tflops["float32"] < 1000
    assert "GB/s" in ceilings.line


def test_floors_by_hand() -> None:
    ceilings = Ceilings(copy_gb_s=100.0, gemm_tflops={"float32": 1.0, "bfloat16": 0.5})
    square = LinearCase("square", "none", 1000, 1000, 1000, R=10, bias=False, mode="forward")
    operations = 2 * 1000**3 + 2 * 1000 * 10 * 2000
    assert work(square) == (operations, 4 * (3 * 1000**2 + 10 * 2000))
    assert floor_ms(square, ceilings) == pytest.approx(operations / 1e9)
    assert floor_ms(square, ceilings, has_lora=False) == pytest.approx(2.0)
    row_case = dataclasses.replace(square, M=1)
    assert floor_ms(row_case, ceilings, has_lora=False) == pytest.approx(4 * (1000**2 + 2000) / 1e8)
    half = dataclasses.replace(square, dtype="bfloat16", adapter_dtype="bfloat16")
    assert floor_ms(half, ceilings, has_lora=False) == pytest.approx(2.0)  # converting gives fp32's rate
    assert floor_ms(dataclasses.replace(square, dtype="float16"), ceilings) is None
    both = dataclasses.replace(square, mode="forward+backward")
    assert (floor_ms(both, ceilings) or 0) > 2 * (floor_ms(square, ceilings) or 0)


def test_cases_with_fewer_rows_than_the_suites_are_told_and_judge_no_target(template: Record) -> None:
    cpu = [case for case in suites.suite("cpu") if case.dtype == "bfloat16" and case.backward and not case.dropout_p]
    times = {FROZEN: 90.0, UNFUSED: 100.0, "torch": 1.0}
    whole = rows(template, cpu, times, driver="")
    fewer = [dataclasses.replace(record, M=64, M_asked=record.M) for record in whole]
    judged = {verdict for *_, verdict in targets.table(targets.Evidence.of(whole))}
    assert judged & {"met", "MISSED"}
    assert {verdict for *_, verdict in targets.table(targets.Evidence.of(fewer))} == {"not measured"}
    assert comparison.shortened(whole) == []
    lines = comparison.shortened(fewer)
    assert any("cases in bf16 at M = 64" in line and "median over the unfused chain: 100x" in line for line in lines)
    assert lines[0] in "\n".join(linear.summary(linear.Run(fewer, CEILINGS, ())))
