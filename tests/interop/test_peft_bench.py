"""The scripts that compare a patched layer with stock PEFT, and what they promise about memory."""

import dataclasses

import pytest
import torch

from bench import peft_layers, peft_memory, peft_step
from bench.peft_layers import PATCHED, STOCK, PeftCase
from lora_kernels.interop import _peft_layers

CPU = torch.device("cpu")
is_small = _peft_layers.is_small
SMALL = PeftCase("small", M=256, N=160, K=192, R=4)


@pytest.mark.parametrize("base", ["linear", "conv1d", "4bit"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_patched_layer_keeps_at_most_two_fifths(base, autocast):
    """PEFT's default: fp32 adapters on a bf16 base, and dropout. About x and xa are kept, as documented."""
    case = dataclasses.replace(SMALL, base=base, autocast=autocast, dropout_p=0.1)
    row = peft_memory.measure(case, CPU)
    assert row.patched_bytes <= peft_memory.TARGET * row.stock_bytes
    assert row.patched_bytes == case.M * case.K * 2 + case.M * case.R * 4 + 8
    assert row.stock_units > (3.0 if autocast else 4.0)


@pytest.mark.parametrize("autocast", [False, True])
def test_without_dropout_it_keeps_no_more(autocast):
    row = peft_memory.measure(dataclasses.replace(SMALL, autocast=autocast), CPU)
    assert row.patched_bytes == SMALL.M * SMALL.K * 2 + SMALL.M * SMALL.R * 4
    assert row.patched_bytes < row.stock_bytes


def test_the_memory_of_fused_calls_is_what_is_measured():
    """None of the script's cases is so small that the patched layer would run PEFT's forward."""
    cases = list(peft_memory.cases())
    assert {case.base for case in cases} == {"linear", "conv1d", "4bit"}
    for case in cases:
        assert max(_peft_layers.SMALL_CALL.values()) <= case.M * case.N * case.K


def test_the_sizes_of_the_step_lie_on_both_sides_of_each_limit():
    sizes = {(case.dtype == "bf16" or case.autocast, case.dropout_p > 0): set() for case in peft_step.cases()}
    for case in peft_step.cases():
        sizes[case.dtype == "bf16" or case.autocast, case.dropout_p > 0].add(case.M * case.N * case.K)
    for (half, dropped), work in sizes.items():
        limit = _peft_layers.SMALL_CALL[16 if half else 32, dropped]
        assert min(work) < limit / 2
        assert any(limit <= size <= 4 * limit for size in work)


def test_layers_are_equal_but_for_the_patch():
    stock, patched = peft_layers.layers(SMALL, CPU).values()
    assert not isinstance(stock, _peft_layers.FusedLayer)
    assert isinstance(patched, _peft_layers.FusedLayer)
    for name, parameter in stock.named_parameters():
        assert torch.equal(parameter, patched.get_parameter(name)), name
    assert stock.lora_A["default"].weight.dtype == torch.float32


def test_a_step_is_timed_for_each_contender(monkeypatch):
    monkeypatch.setattr(_peft_layers, "is_small", is_small)
    rows = peft_step.measure(dataclasses.replace(SMALL, M=8, autocast=True), CPU, budget_s=0.0)
    assert [row.contender for row in rows] == [STOCK, PATCHED, peft_step.ALWAYS_FUSED]
    assert rows[0].ratio == 1.0
    assert all(row.ms > 0 for row in rows)
    assert _peft_layers.is_small is is_small


def test_command_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peft_memory, "SHAPES", (SMALL,))
    assert peft_memory.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    assert "with dropout, at most" in capsys.readouterr().out
    assert len((tmp_path / "peft_memory.csv").read_text().splitlines()) == 5
    monkeypatch.setattr(peft_memory, "TARGET", 0.1)
    assert peft_memory.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    monkeypatch.setattr(peft_step, "LIMITS", (SMALL,))
    monkeypatch.setattr(peft_step, "SITUATIONS", (("bf16", False),))
    peft_step.main(["--device", "cpu", "--budget", "0", "--only", "small", "--out", str(tmp_path)])
    assert "patched steps are more than 3% slower" in capsys.readouterr().out
    assert len((tmp_path / "peft_step.csv").read_text().splitlines()) == 1 + 2 * 3


def test_what_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "bitsandbytes" else object())
    assert peft_layers.why_not(SMALL) is None
    four_bit = dataclasses.replace(SMALL, base="4bit")
    assert peft_layers.why_not(four_bit) == "not installed: bitsandbytes (pip install '.[dev]')"
