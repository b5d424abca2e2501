"""The suites: shapes as the models publish them, products as declared, and budgets that say what they left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import linear, providers, run, suites
from lora_kernels.benchmarking.cases import select
from lora_kernels.benchmarking.roofline import Ceilings

CPU = torch.device("cpu")
CEILINGS = Ceilings(copy_gb_s=10.0, gemm_tflops={"float32": 0.1, "bfloat16": 0.1})


def test_the_clock_never_runs_below_nothing() -> None:
    assert [linear.clock(s) for s in (125.4, 59.6, 0.2, -3.0)] == ["2:05", "1:00", "0:00", "0:00"]


# out_features, in_features and biases, counted by hand from each model's modules.
@pytest.mark.parametrize(
    ("model", "shapes", "biases"),
    [
        (
            suites.LLAMA3_8B,
            {"q+o": (4096, 4096), "k+v": (1024, 4096), "gate+up": (14336, 4096), "down": (4096, 14336)},
            "",
        ),
        (
            suites.LLAMA3_70B,
            {"q+o": (8192, 8192), "k+v": (1024, 8192), "gate+up": (28672, 8192), "down": (8192, 28672)},
            "",
        ),
        (
            suites.QWEN25_7B,
            {"q": (3584, 3584), "k+v": (512, 3584), "o": (3584, 3584), "gate+up": (18944, 3584), "down": (3584, 18944)},
            "q k+v",
        ),
        (
            suites.QWEN25_32B,
            {
                "q": (5120, 5120),
                "k+v": (1024, 5120),
                "o": (5120, 5120),
                "gate+up": (27648, 5120),
                "down": (5120, 27648),
            },
            "q k+v",
        ),
        (
            suites.GEMMA2_9B,
            {
                "q": (4096, 3584),
                "k+v": (2048, 3584),
                "o": (3584, 4096),
                "gate+up": (14336, 3584),
                "down": (3584, 14336),
            },
            "",
        ),
        (suites.BERT_BASE, {"q+k+v+o": (768, 768), "up": (3072, 768), "down": (768, 3072)}, "q+k+v+o up down"),
        (suites.VIT_L, {"q+k+v+o": (1024, 1024), "up": (4096, 1024), "down": (1024, 4096)}, "q+k+v+o up down"),
    ],
    ids=lambda value: getattr(value, "slug", ""),
)
def test_shapes_are_the_models(model: suites.Model, shapes: dict[str, tuple[int, int]], biases: str) -> None:
    assert {x.position: (x.N, x.K) for x in model.distinct} == shapes
    assert {x.position for x in model.distinct if x.bias} == set(biases.split())


def test_mistral_is_timed_as_llama() -> None:
    assert suites.MISTRAL_7B.linears == suites.LLAMA3_8B.linears
    full = suites.suite("full")
    assert any(case.model == "Mistral-7B" for case in full)
    assert not any(case.model == "Mistral-7B" for case in suites.distinct(full))


def test_the_full_product_has_what_is_promised() -> None:
    full = suites.suite("full")
    assert {case.M for case in full} == {1, 16, 64, 512, 2048, 8192, 16384}
    assert {8, 16, 64, 128, 256} <= {case.R for case in full}
    assert {case.dropout_p for case in full} == {0.0, 0.1}
    assert {case.mode for case in full} == {"forward", "forward+backward"}
    assert len({case.model for case in full}) == len(suites.MODELS) == 8
    assert not any(case.mode == "forward" and case.dropout_p for case in full)


@pytest.mark.parametrize("name", suites.NAMES)
def test_suites_hold_each_case_once_and_can_be_selected_from(name: str) -> None:
    cases = suites.suite(name)
    assert len(set(cases)) == len(cases) > 0
    if name != suites.CPU:
        assert sum(len(sweep) for sweep in suites.SUITES[name]) >= len(cases)
    assert set(select(cases, "p=0.1")) == {case for case in cases if case.dropout_p == 0.1}


def test_decode_is_forward_under_graphs_on_a_gpu_only() -> None:
    on_gpu = linear.chosen_cases("decode", "", torch.device("cuda"))
    assert all(case.graph and case.mode == "forward" and case.M <= 64 for case in on_gpu)
    assert not any(case.graph for case in linear.chosen_cases("decode", "", CPU))


def test_the_targets_rows_come_first_in_the_gpus_suite() -> None:
    gpu_suite, headline = suites.suite("gpu"), suites.suite("headline")
    assert gpu_suite[: len(headline)] == headline


def test_an_unknown_suite_is_named() -> None:
    with pytest.raises(ValueError, match=r"suite must be one of cpu, .*; got 'everything'"):
        suites.suite("everything")


def test_a_budget_drops_the_last_cases_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [suites.LinearCase(f"tiny.{i}", "none", 32, 16, 16, R=4) for i in range(3)]
    found = linear.run(
        cases, CPU, tmp_path, budget_s=0.01, total_s=0.0, ceilings=CEILINGS,
        contenders=lambda case, device: providers.BASELINES,
    )  # fmt: skip
    assert {record.name for record in found.records} == {"tiny.0"}  # one case is always run
    assert [case.name for case in found.left_out] == ["tiny.1", "tiny.2"]
    assert any(line.startswith("LEFT OUT: 2 of 3 cases") for line in linear.summary(found))
    written = json.loads((tmp_path / "run.json").read_text())
    assert (written["cases"], len(written["left_out"])) == (1, 2)
    assert "tiny.0" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} >= {"linear.csv", "linear.json", "run.json", "linear_cost.png"}


def test_every_row_has_its_roofline_and_peak(tmp_path: Path) -> None:
    case = suites.LinearCase("tiny", "none", 32, 16, 16, R=4)
    found = linear.run(
        [case], CPU, tmp_path, budget_s=0.01, ceilings=CEILINGS, rows_only=True,
        contenders=lambda case, device: (*providers.BASELINES, providers.AUTO),
    )  # fmt: skip
    for record in found.records:
        assert record.floor_ms is not None
        assert record.roofline == pytest.approx(record.floor_ms / record.median_ms)
        assert record.peak_bytes is not None
        assert record.error is not None
    assert {path.name for path in tmp_path.iterdir()} <= {"linear.csv", "run.json", "linear_benchmark.json"}


def test_a_budget_on_a_cpu_leaves_the_targets_cases() -> None:
    cases = suites.suite(suites.CPU)
    targets = [case.backward and not case.dropout_p and case.dtype == case.adapter_dtype for case in cases]
    assert targets == sorted(targets, reverse=True)
    assert [case.dtype for case in cases[:2]] == ["float32", "bfloat16"]


def test_without_a_gpu_the_suite_is_the_cpus_and_what_is_left_out_is_said(tmp_path: Path, monkeypatch, capsys) -> None:
    def timed(cases, *_, **__) -> None:
        assert cases == linear.chosen_cases(suites.CPU, "", CPU)
        raise InterruptedError

    monkeypatch.setattr(run, "lora_kernels", lambda argv: 0)
    monkeypatch.setattr(run.linear, "run", timed)
    with pytest.raises(InterruptedError):
        run.main(["--device", "cpu", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "No GPU: the suite for CPUs" in said
    for name in set(suites.NAMES) - {suites.CPU}:
        assert f"{name} ({len(suites.suite(name))} cases)" in said


def test_the_check_before_a_benchmark_is_of_its_device_and_short_on_a_gpu() -> None:
    assert run.check_of(CPU) == ["check", "--device", "cpu"]
    assert run.check_of(torch.device("cuda")) == ["check", "--device", "cuda", "--quick"]
