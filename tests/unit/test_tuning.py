"""`lora-kernels tune`: what is measured is right, kept, believed, and survives an interruption."""

import sys
from types import SimpleNamespace

import pytest
import torch

from lora_kernels import config, explain_plan
from lora_kernels.benchmarking import tuner
from lora_kernels.benchmarking.cases import LinearCase
from lora_kernels.benchmarking.timer import Samples
from lora_kernels.cli import main
from lora_kernels.ops import _linear_torch
from lora_kernels.planning import measured
from lora_kernels.planning.device import device_traits

CPU = torch.device("cpu")
CASE = LinearCase("x", "y", 40, 24, 32, R=4, dtype="bfloat16", adapter_dtype="bfloat16")
COMMAND = ["tune", "--shapes", "40x24x32,70x24x32", "--dtype", "bf16", "--rank", "4", "--device", "cpu"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "CACHE", tmp_path)
    measured.forget()
    yield tmp_path
    measured.forget()


@pytest.fixture
def clock(monkeypatch):
    """Times of the ways, in milliseconds, instead of a stopwatch; what was called is called once."""
    times = {"torch/library": 2.0, "torch/upcast": 1.0}

    def interleave(contenders, **_):
        for call in contenders.values():
            call()
        return Samples({name: (times[name],) for name in contenders})

    monkeypatch.setattr(tuner, "interleave", interleave)
    return times


def test_questions_are_problems_at_their_bucket_each_once():
    forward = LinearCase("a", "m", 33, 24, 32, mode="forward")
    asked = tuner.questions([forward, CASE, LinearCase("b", "m", 64, 24, 32, bias=False)])
    described = [(q.direction, q.case.M, q.case.dtype) for q in asked]
    assert described == [
        ("forward", 64, "float32"),
        ("forward", 64, "bfloat16"),
        ("backward", 64, "bfloat16"),
        ("backward", 64, "float32"),
    ]


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("adapters", ["bfloat16", "float32"])
def test_every_way_is_timed(p, adapters):
    case = LinearCase("", "", 40, 24, 32, R=4, dtype="bfloat16", adapter_dtype=adapters, dropout_p=p)
    for question in tuner.questions([case]):
        outcome = tuner.tune(question, CPU, budget_s=0.01)
        assert outcome.refused == {}
        assert set(outcome.timings) == {"torch/library", "torch/upcast"}
        assert all(timing.us > 0 for timing in outcome.timings.values())
        assert outcome.key.direction == question.direction
        assert (outcome.key.M, outcome.key.dropout) == (64, p > 0)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_wrong_way_gets_no_time(direction, monkeypatch):
    right = getattr(_linear_torch, direction)

    def wrong(*arguments):
        first, *rest = right(*arguments)
        plan = arguments[-1]
        upcast = (plan.strategy if direction == "forward" else plan.backward_way.strategy) == "upcast"
        return (first * 1.02 if upcast else first, *rest)

    monkeypatch.setattr(_linear_torch, direction, wrong)
    (question,) = (q for q in tuner.questions([CASE]) if q.direction == direction)
    outcome = tuner.tune(question, CPU, budget_s=0.01)
    assert set(outcome.timings) == {"torch/library"}
    tensor = "y" if direction == "forward" else "d_x"
    assert outcome.refused == {"torch/upcast": f"{tensor} is off by more than twice eager's error"}


def test_a_way_that_raises_is_named_and_the_others_are_timed(monkeypatch):
    def fails(*_):
        raise RuntimeError("out of resource: shared memory\nand more")

    monkeypatch.setattr(_linear_torch, "_upcast_gemm", fails)
    outcome = tuner.tune(tuner.questions([CASE])[0], CPU, budget_s=0.01)
    assert outcome.refused == {"torch/upcast": "RuntimeError: out of resource: shared memory"}
    assert set(outcome.timings) == {"torch/library"}


@pytest.mark.parametrize("faster", ["library", "upcast"])
def test_auto_takes_the_winner_from_then_on(cache, clock, capsys, faster):
    clock[f"torch/{faster}"] = 0.5
    assert main([*COMMAND, "--budget", "30"]) == 0
    out = capsys.readouterr().out
    assert "4 questions" in out
    assert "4 of 4 kept" in out
    assert str(cache) in out
    measured.forget()
    told = explain_plan(35, 24, 32, 4, dtype=torch.bfloat16, device="cpu")
    assert (told.strategy, told.backward_way.strategy, told.measured) == (faster, faster, True)


def test_an_interruption_keeps_what_was_measured(clock, monkeypatch, capsys):
    real, calls = tuner.tune, []

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(tuner, "tune", interrupted)
    assert main([*COMMAND, "--budget", "30"]) == 130
    out = capsys.readouterr().out
    assert "interrupted" in out
    assert "2 of 4 kept, 2 left out" in out
    measured.forget()
    assert len(measured.table_of(device_traits(CPU.type, None).name)) == 2


def test_what_does_not_fit_is_left_out_and_said(clock, monkeypatch, capsys):
    real, calls = tuner.tune, []

    def too_large(question, *arguments, **options):
        calls.append(question)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
        return real(question, *arguments, **options)

    monkeypatch.setattr(tuner, "tune", too_large)
    assert main([*COMMAND, "--budget", "30"]) == 0
    out = capsys.readouterr().out
    assert "left out: CUDA out of memory. Tried to allocate" in out
    assert "3 of 4 kept, 1 left out" in out


def test_what_a_cpu_cannot_allocate_is_left_out_and_said(clock, capsys):
    shapes = "40x24x32,1048576x1048576x1048576,70x24x32"
    assert main(["tune", "--shapes", shapes, "--dtype", "fp32", "--device", "cpu", "--budget", "30"]) == 0
    out = capsys.readouterr().out
    assert "can't allocate memory" in out
    assert "4 of 6 kept, 2 left out" in out  # forward and backward of each shape


def test_progress_is_shown_on_a_terminal(clock, monkeypatch, capsys):
    assert main([*COMMAND, "--budget", "30"]) == 0
    assert "s left" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main([*COMMAND, "--budget", "30"]) == 0
    err = capsys.readouterr().err
    assert "[........................] 0/4  " in err
    assert "[############............] 2/4  " in err


def test_a_lost_device_ends_it_and_keeps_what_was_measured(clock, monkeypatch, capsys):
    real, calls = tuner.tune, []

    def faults(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            monkeypatch.setattr(torch.cuda, "synchronize", lambda _: (_ for _ in ()).throw(RuntimeError("illegal")))
            tuner._probe(torch.device("cuda"), "triton/persistent")
        return real(*arguments, **options)

    monkeypatch.setattr(tuner, "tune", faults)
    assert main([*COMMAND, "--budget", "30"]) == 1
    out = capsys.readouterr().out
    assert "stopped: triton/persistent left the device unusable for this process: illegal" in out
    assert "1 of 4 kept, 3 left out" in out


def test_a_fault_that_passes_is_no_loss(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    tuner._probe(torch.device("cuda"), "a tile too large")
    tuner._probe(CPU, "anything")


def test_the_budget_ends_it(clock, monkeypatch, capsys):
    import lora_kernels.cli.tune as command

    now = iter(range(0, 1000, 5))
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: next(now)))
    assert main([*COMMAND, "--budget", "12"]) == 0
    assert "2 of 4 kept, 2 left out" in capsys.readouterr().out


def test_nothing_kept_is_a_failure(monkeypatch, capsys):
    monkeypatch.setattr(tuner, "tune", lambda question, *_, **__: tuner.Outcome(question, None, {}, {"way": "why"}))
    assert main([*COMMAND, "--budget", "30"]) == 1
    out = capsys.readouterr().out
    assert "nothing could be timed" in out
    assert "way: why" in out
    assert "0 of 4 kept, 4 left out" in out


def test_a_folder_that_cannot_be_written(clock, cache, monkeypatch, capsys):
    (cache / "file").write_text("")
    monkeypatch.setattr(config, "CACHE", cache / "file" / "below")
    assert main([*COMMAND, "--budget", "30"]) == 1
    assert "not kept" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--budget", "0"], ["--budget", "nan"], ["--shapes", "4x4"], ["--rank", "0"]])
def test_bad_arguments(arguments, capsys):
    assert main(["tune", "--device", "cpu", *arguments]) == 2
    assert arguments[0] in capsys.readouterr().err
