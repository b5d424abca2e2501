"""The tutorials, run as a reader would run them, and what they promise."""

import pytest
import torch
from peft import PeftModel

from lora_kernels import set_adapter
from lora_kernels.testing import ERROR_FACTOR, relative_error
from tests.documents import ROOT, run_python_blocks
from tests.equality import assert_same_numbers, differ

pytestmark = [
    pytest.mark.slow,
    # PEFT and the tutorial use names that every Transformers 5 has, and that are to go with 6.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
]


@pytest.fixture(autouse=True)
def small_calls_fused():
    """Not here: a reader's small calls run PEFT's forward."""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """What the names of a tutorial stand for at its end."""
    monkeypatch.chdir(tmp_path)
    return lambda name: run_python_blocks(ROOT / "docs" / "tutorials" / name)


def test_finetune(run):
    found = run("finetune.md")
    assert_learned(found)
    assert found["trainer_accuracy"] > found["baseline"]

    assert_same_numbers(found["unmerged_logits"], found["logits"])
    assert_same_numbers(found["loaded_logits"], found["logits"])
    model = found["AutoModelForSequenceClassification"].from_pretrained(found["base"], num_labels=2)
    model.classifier.load_state_dict(found["load_file"]("adapter/head.safetensors"))
    found["patched"], found["model"] = found["model"], PeftModel.from_pretrained(model, "adapter").double()
    truth = found["collected"](lambda batch: found["model"](**batch).logits, found["test_set"])
    assert_agree(found, truth, "logits", "merged_logits")

    # With dropout: another seed has other gradients, a forward that is run again has not.
    assert_same_numbers(found["kept"], found["recomputed"])
    found["model"] = found["patched"]
    assert all(map(differ, found["kept"], found["gradients"](seed=2)))

    # The words of a causal model; with them, that the adapter has a say in them.
    assert torch.equal(found["words"], found["merged_words"])
    set_adapter(found["llama"], None)
    assert not torch.equal(found["llama"].generate(**found["prompt"], max_new_tokens=16), found["words"])


def test_vision(run):
    found = run("vision.md")
    assert_learned(found)
    assert found["low_accuracy"] > 0.9
    assert_same_numbers(found["low_again_logits"], found["low_logits"])
    assert_same_numbers(found["loaded_logits"], found["logits"])
    model = found["ViTForImageClassification"].from_pretrained("digits-0-4")
    assert_same_numbers(
        found["logits_of"](model, found["images"][found["low"] & found["held_out"]]), found["low_logits"]
    )
    model.classifier.load_state_dict(found["load_file"]("digits-5-9/head.safetensors"))
    model = PeftModel.from_pretrained(model, "digits-5-9").double()
    truth = found["logits_of"](model, found["test_images"].double())
    assert_agree(found, truth, "logits", "merged_logits", "patched_logits")


def assert_learned(found):
    """The loss falls, and the adapter beats a probe of the frozen model."""
    losses = found["losses"]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert found["accuracy"] > found["baseline"] > 0.5


def assert_agree(found, truth, *names):
    """The error budget: at most twice the error of PEFT's logits, against PEFT in fp64."""
    limit = ERROR_FACTOR * relative_error(found["peft_logits"], truth)
    assert 0 < limit < 1e-4
    errors = {name: relative_error(found[name], truth) for name in names}
    assert {name: error for name, error in errors.items() if error > limit} == {}
