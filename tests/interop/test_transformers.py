"""patch_peft on models of Transformers: one step, `Trainer`, checkpointing, `generate`, held to stock PEFT."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from lora_kernels import patch_peft
from lora_kernels.interop import _peft_layers
from lora_kernels.testing import budget_rows
from tests.equality import assert_same_numbers, differ
from tests.interop.peft_cases import fused_calls, layers_of, patched_twin, stock_twin

# The names that every Transformers 5 has, by which PEFT and these tests call; the newest has given them another one.
pytestmark = pytest.mark.filterwarnings(r"ignore:`\w*gradient_checkpointing\w*` is deprecated:FutureWarning")

BF16, FP32 = torch.bfloat16, torch.float32
VOCABULARY = 61
TARGETS = {
    "llama": ["q_proj", "v_proj", "gate_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "bert": ["query", "key", "intermediate.dense", "output.dense"],
}
LAYERS = {"llama": 2 * 4, "gpt2": 2 * 4, "bert": 2 * 5}
each_model = pytest.mark.parametrize("kind", TARGETS)
# PEFT's own wrapper, and Transformers' integration, which leaves the model what it is.
each_way = pytest.mark.parametrize("way", ["get_peft_model", "add_adapter"])

# Several, since each rounding in the first layers is passed on to all results.
BATCHES = torch.randint(3, VOCABULARY, (8, 4, 11), generator=torch.Generator().manual_seed(0))
IDS = BATCHES[0]


# The weights' scale, about 1 / sqrt(width). With Transformers' 0.02 the first norms enlarge what was rounded before
# them, and a run's error in bf16 is a matter of luck: 0.3 to 3.9 times stock PEFT's.
SIZE = {"vocab_size": VOCABULARY, "initializer_range": 0.1}
# No dropout of the models' own, so that nothing but the adapters draws from torch's generator.
CONFIGS = {
    "llama": LlamaConfig(
        **SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    ),
    "gpt2": GPT2Config(
        **SIZE, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=None, pad_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, loss_type="ForCausalLM",
    ),
    "bert": BertConfig(
        **SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ),
}  # fmt: skip
CLASSES = {"llama": LlamaForCausalLM, "gpt2": GPT2LMHeadModel, "bert": BertForSequenceClassification}


def adapted(kind, *, way="get_peft_model", dtype=FP32, lora_dropout=0.0):
    """In training mode, with a B that is not zero, by PEFT alone."""
    config = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=lora_dropout, target_modules=TARGETS[kind], fan_in_fan_out=kind == "gpt2",
        init_lora_weights=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = CLASSES[kind](CONFIGS[kind]).to(dtype)
    if way == "get_peft_model":
        model = get_peft_model(model, config)
    else:
        model.add_adapter(config)
    assert len(layers_of(model)) == LAYERS[kind]
    return model.train()


def labels_of(kind, ids):
    return ids[:, 0] % 2 if kind == "bert" else ids


def adapter(model):
    """{"lora_A": all of them, "lora_B": all of them}, by name of the parameter below."""
    found = {"lora_A": {}, "lora_B": {}}
    for name, parameter in model.named_parameters():
        for part, parameters in found.items():
            if part in name:
                parameters[name] = parameter
    return found


def step(kind, model, *, ids=IDS, seed=7):
    """Logits and gradients of one forward and backward."""
    model.zero_grad()
    torch.manual_seed(seed)
    output = model(input_ids=ids, labels=labels_of(kind, ids))
    output.loss.backward()
    gradients = {
        f"d_{part}": torch.cat([p.grad.flatten() for p in found.values()]) for part, found in adapter(model).items()
    }
    return {"logits": output.logits.detach(), **gradients}


def steps(kind, model):
    """The same of all batches, as one tensor for each name."""
    found = [step(kind, model, ids=ids) for ids in BATCHES]
    return {name: torch.stack([one[name] for one in found]) for name in found[0]}


def assert_within_budget(actual, eager, truth):
    """At most twice stock PEFT's error, against PEFT in fp64."""
    rows = budget_rows(actual, eager, truth)
    failed = "\n".join(f"{row.name}: {row.error:.2e} > {row.limit:.2e}" for row in rows if not row.ok)
    assert not failed, failed


def assert_steps_within_budget(kind, model):
    with fused_calls() as calls:
        actual = steps(kind, patched_twin(model))
    assert calls.operations == ["lora_linear"] * (len(BATCHES) * LAYERS[kind])
    assert_within_budget(actual, steps(kind, stock_twin(model)), steps(kind, stock_twin(model).double()))


@each_model
@each_way
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_step(kind, way, dtype, p):
    assert_steps_within_budget(kind, adapted(kind, way=way, dtype=dtype, lora_dropout=p))


@each_model
def test_the_budget_sees_a_wrong_result(kind, monkeypatch):
    lora_linear = _peft_layers.lora_linear
    monkeypatch.setattr(
        _peft_layers, "lora_linear", lambda *args, scaling, **rest: lora_linear(*args, scaling=1.01 * scaling, **rest)
    )
    with pytest.raises(AssertionError, match="lora_A"):
        assert_steps_within_budget(kind, adapted(kind))


@each_model
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_with_dropout(kind, reentrant):
    model = adapted(kind, lora_dropout=0.3)
    patch_peft(model)
    model.enable_input_require_grads()  # of a block whose inputs require no gradient, the reentrant kind computes none
    with fused_calls() as calls:
        expected, other = step(kind, model), step(kind, model, seed=8)
        once = len(calls.operations) // 2
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        found = step(kind, model)
    assert len(calls.operations) == 4 * once  # each forward twice
    assert_same_numbers(found, expected)
    assert all(differ(other[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@each_way
def test_generate(kind, way):
    model = adapted(kind, way=way).eval()
    patched = patched_twin(model)
    prompt = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 7, "do_sample": False}
    expected = model.generate(**prompt)
    with fused_calls() as calls:
        assert torch.equal(patched.generate(**prompt), expected)
    assert len(calls.operations) == 7 * LAYERS[kind]  # the prompt, and six tokens one by one from the cache
    for layer in layers_of(patched):
        layer.merge()
    with fused_calls() as calls:
        assert torch.equal(patched.generate(**prompt), expected)
    assert calls.operations == []
    for layer in layers_of(patched):
        layer.unmerge()
        layer.enable_adapters(False)
    assert not torch.equal(patched.generate(**prompt), expected)


class Rows(torch.utils.data.Dataset):
    def __init__(self, kind):
        self.kind = kind

    def __len__(self):
        return 12

    def __getitem__(self, index):
        ids = BATCHES.flatten(0, 1)[index]
        return {"input_ids": ids, "labels": labels_of(self.kind, ids[None])[0]}


def trained(kind, model, path, **options):
    """How far three steps of plain SGD have moved the adapter."""
    before = {
        name: p.detach().to(torch.float64, copy=True) for found in adapter(model).values() for name, p in found.items()
    }
    arguments = TrainingArguments(
        output_dir=str(path), max_steps=3, per_device_train_batch_size=4, learning_rate=0.5, optim="sgd",
        lr_scheduler_type="constant", report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False, **options,
    )  # fmt: skip
    result = Trainer(model, arguments, train_dataset=Rows(kind)).train()
    assert result.global_step == 3
    moved = {
        part: torch.cat([(p.detach().double() - before[name]).flatten() for name, p in found.items()])
        for part, found in adapter(model).items()
    }
    assert all(tensor.abs().max() > 0 for tensor in moved.values())
    return moved


SETTINGS = {  # the model's dtype, and whether Trainer runs it under autocast
    "fp32": (FP32, False),
    "fp32, bf16 autocast": (FP32, True),
    "bf16, fp32 adapters": (BF16, False),
    "bf16, fp32 adapters, autocast": (BF16, True),
}


@each_model
@pytest.mark.parametrize(("dtype", "autocast"), SETTINGS.values(), ids=SETTINGS)
def test_trainer(kind, dtype, autocast, tmp_path):
    model = adapted(kind, dtype=dtype, lora_dropout=0.1)
    with fused_calls() as calls:
        actual = trained(kind, patched_twin(model), tmp_path, bf16=autocast)
    assert calls.operations == ["lora_linear"] * (3 * LAYERS[kind])
    eager = trained(kind, stock_twin(model), tmp_path, bf16=autocast)
    truth = trained(kind, stock_twin(model).double(), tmp_path)
    assert_within_budget(actual, eager, truth)


@each_model
def test_trainer_that_checkpoints(kind, tmp_path):
    model = adapted(kind, lora_dropout=0.1)
    expected = trained(kind, patched_twin(model), tmp_path)
    found = trained(kind, patched_twin(model), tmp_path, gradient_checkpointing=True)
    # Kept in fp64, and computed in fp32.
    assert_same_numbers(*({part: t.float() for part, t in moved.items()} for moved in (found, expected)))
