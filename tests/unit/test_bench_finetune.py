"""bench.finetune on a tiny random encoder: the arms agree, and a wrong one is seen."""

import csv

import pytest
import torch
import transformers

from bench import docstrings, finetune
from lora_kernels.interop import _peft_layers


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A configuration of a two-layer BERT with random weights, and a few texts that two words tell apart."""
    monkeypatch.setattr(_peft_layers, "is_small", lambda layer, x: False)
    torch.manual_seed(0)
    encoder = transformers.BertModel(
        transformers.BertConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=30522
        )
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(finetune.demo_model())
    monkeypatch.setattr(finetune, "load_encoder", lambda name: (encoder, tokenizer))
    texts = [(f"{word} number {index}", label) for index in range(40) for label, word in enumerate(("loop", "mail"))]
    loaded = docstrings.LabelledTexts(("asyncio", "email"), tuple(texts[:60]), tuple(texts[60:]))
    monkeypatch.setattr(docstrings, "load", lambda: loaded)
    arguments = ["--model", "tiny", "--steps", "6", "--batch", "8", "--length", "8", "--rank", "4", "--device", "cpu"]
    return lambda *more: finetune.configure([*arguments, *more])[0]


def test_arms_agree_and_everything_is_written(small, tmp_path, capsys):
    outcome = finetune.run(small(), tmp_path)
    assert list(outcome.losses) == [finetune.PEFT, finetune.TWIN, finetune.PATCHED, finetune.NATIVE]
    assert len({losses[0] for losses in outcome.losses.values()}) <= 2  # B is zero: only the twin's base differs
    assert all(losses[-1] < losses[0] for losses in outcome.losses.values())
    assert not finetune.failed(outcome)
    assert outcome.saved[finetune.PATCHED] <= outcome.saved[finetune.PEFT]
    with (tmp_path / "finetune.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert float(rows[-1]["loss, add_lora"]) == outcome.losses[finetune.NATIVE][-1]
    assert (tmp_path / "finetune.png").stat().st_size > 10_000
    report = "\n".join(finetune.report(outcome))
    assert "patch_peft agrees" in report
    assert "add_lora agrees" in report


@pytest.mark.parametrize("arm", finetune.OURS)
def test_a_wrong_arm_is_seen(small, tmp_path, monkeypatch, arm):
    module = "lora_kernels.interop._peft_layers" if arm == finetune.PATCHED else "lora_kernels.nn.linear"
    lora_linear = _peft_layers.lora_linear
    monkeypatch.setattr(
        f"{module}.lora_linear", lambda *args, scaling, **rest: lora_linear(*args, scaling=1.001 * scaling, **rest)
    )
    outcome = finetune.run(small(), tmp_path)
    assert [name for name in finetune.OURS if not outcome.agrees(name)] == [arm]
    assert finetune.failed(outcome)
    assert f"{arm} DISAGREES" in "\n".join(finetune.report(outcome))


def test_dropout_is_not_judged(small, tmp_path):
    outcome = finetune.run(small("--dropout", "0.3"), tmp_path)
    assert not outcome.asserted
    assert not finetune.failed(outcome)
    assert max(outcome.strayed(finetune.PATCHED)) > 1e-3
    assert "not judged" in "\n".join(finetune.report(outcome))
    # Ours draw the same seeds in the same order.
    for ours, theirs in zip(outcome.losses[finetune.PATCHED], outcome.losses[finetune.NATIVE], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
