"""bench.llama_step, its small size on a CPU: right before it is timed, and rows that say what was measured."""

import dataclasses

import pytest
import torch

from bench import llama_step
from bench.llama_step import CASES, PATCHED, STOCK, Case, LlamaRow
from lora_kernels.benchmarking.records import read_csv
from lora_kernels.interop import _peft_layers

CPU = torch.device("cpu")
DEFAULT = Case("fp32", autocast=False, dropout_p=0.05, checkpointing=False)


def measured(case):
    return llama_step.measure("tiny", case, CPU, budget_s=0.0)


def test_cases_cover_what_is_asked():
    assert len(set(CASES)) == len(CASES) == 12
    assert CASES[0] == DEFAULT
    for adapters in ("fp32", "bf16"):
        for p in (0.0, 0.05):
            for checkpointing in (False, True):
                assert Case(adapters, False, p, checkpointing) in CASES


def test_both_contenders_have_the_same_parameters():
    stock = llama_step.stock_model(llama_step.SIZES["tiny"], DEFAULT, CPU)
    patched = llama_step.patched_twin(stock)
    theirs, ours = dict(stock.named_parameters()), dict(patched.named_parameters())
    assert theirs.keys() == ours.keys()
    assert all(ours[name] is parameter for name, parameter in theirs.items())
    assert not any(isinstance(module, _peft_layers.FusedLayer) for module in stock.modules())
    assert sum(isinstance(module, _peft_layers.FusedLayer) for module in patched.modules()) == 2 * 7
    adapters = {p.dtype for name, p in theirs.items() if "lora_" in name}
    assert adapters == {torch.float32}
    assert {p.dtype for name, p in theirs.items() if "lora_" not in name} == {torch.bfloat16}


def test_rows_of_the_default_case():
    stock, patched = measured(DEFAULT)
    assert (stock.contender, patched.contender) == (STOCK, PATCHED)
    assert stock.ratio == 1
    assert 0 < patched.error <= patched.error_budget == 2 * stock.error
    assert patched.error != stock.error  # it was fused
    assert patched.saved_bytes < 0.5 * stock.saved_bytes
    assert patched.peak_bytes < 0.6 * stock.peak_bytes
    text = llama_step.line([stock, patched])
    assert text.startswith("fp32 adapters p=0.05 ")
    assert "1.000" not in text


def test_under_checkpointing_a_step_peaks_lower():
    checkpointed = measured(dataclasses.replace(DEFAULT, checkpointing=True))
    assert [row.saved_bytes for row in checkpointed] == [None, None]
    for less, more in zip(checkpointed, measured(DEFAULT), strict=True):
        assert less.peak_bytes < more.peak_bytes


def test_command_line(tmp_path, capsys):
    arguments = ["--device", "cpu", "--size", "tiny", "--budget", "0", "--out", str(tmp_path)]
    assert llama_step.main([*arguments, "--only", "bf16 p=0"]) == 0
    rows = read_csv(tmp_path / "llama_step.csv", LlamaRow)
    assert [(row.contender, row.checkpointing) for row in rows] == [
        (STOCK, False), (PATCHED, False), (STOCK, True), (PATCHED, True)
    ]  # fmt: skip
    assert capsys.readouterr().out.count("bf16 adapters p=0 ") == 2
    assert llama_step.main([*arguments, "--only", "bf16 p=0", "--total", "0"]) == 0
    assert "LEFT OUT: 1 of 2 cases" in capsys.readouterr().out


def test_a_wrong_result_is_not_timed(monkeypatch, tmp_path, capsys):
    lora_linear = _peft_layers.lora_linear
    monkeypatch.setattr(
        _peft_layers, "lora_linear", lambda *args, scaling, **rest: lora_linear(*args, scaling=1.1 * scaling, **rest)
    )
    arguments = ["--device", "cpu", "--size", "tiny", "--budget", "0", "--out", str(tmp_path)]
    assert llama_step.main([*arguments, "--only", "bf16 p=0.05 checkpointing"]) == 1
    assert "FAULT: bf16 adapters p=0.05 checkpointing: ArithmeticError: gradients err by" in capsys.readouterr().out
    assert not (tmp_path / "llama_step.csv").exists()


def test_what_is_missing_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert llama_step.main([]) == llama_step.NOT_THERE
    assert "needs a GPU" in capsys.readouterr().out
    monkeypatch.setattr(llama_step.importlib.util, "find_spec", lambda name: None)
    assert llama_step.main(["--device", "cpu", "--size", "tiny"]) == llama_step.NOT_THERE
    assert "not installed: peft, transformers, accelerate" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        llama_step.main(["--size", "huge"])
