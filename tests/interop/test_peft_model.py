"""Everything of PEFT that is not forward stays PEFT's: classes, files, merging, several adapters, swapping them."""

import copy
import gc
import io
import json
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lora_kernels
from lora_kernels import ArgumentError, PatchRow, UnsupportedError, patch_peft, unpatch_peft
from lora_kernels.interop import _peft_layers
from tests.equality import assert_same_numbers
from tests.interop.peft_cases import Net, adapted, fused_calls, inputs, layers_of, patched_twin, run

FP32, BF16 = torch.float32, torch.bfloat16
X = inputs(FP32)


def classes(model):
    return [type(layer) for layer in layers_of(model)]


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def assert_fused(model, *args, count=2, **kwargs):
    with fused_calls() as calls:
        y = model(*args, **kwargs)
    assert len(calls.operations) == count
    return y


# The patch itself.


def test_the_class_is_all_that_changes():
    model = adapted(BF16, lora_dropout=0.1)
    patched = patched_twin(model)
    assert classes(patched) == [_peft_layers.Linear] * 2
    assert repr(patched) == repr(model)
    assert list(patched.state_dict()) == list(model.state_dict())
    for layer, stock in zip(layers_of(patched), layers_of(model), strict=True):
        assert isinstance(layer, lora.Linear)
        assert layer.__dict__.keys() == stock.__dict__.keys()
    assert [name for name, _ in patched.named_modules()] == [name for name, _ in model.named_modules()]


def test_patching_twice_and_unpatching():
    model = adapted(FP32)
    first, second = patch_peft(model), patch_peft(model)
    assert first == second
    assert classes(model) == [_peft_layers.Linear] * 2
    unpatch_peft(model)
    assert classes(model) == [lora.Linear] * 2
    unpatch_peft(model)
    assert classes(model) == [lora.Linear] * 2
    unpatch_peft(nn.Linear(2, 2))


def test_context_manager_unpatches_what_it_patched():
    model = adapted(FP32)
    patch_peft(layers_of(model)[0])
    with patch_peft(model) as report:
        assert report.fused == 2
        assert classes(model) == [_peft_layers.Linear] * 2
    assert classes(model) == [_peft_layers.Linear, lora.Linear]
    with pytest.raises(KeyError), patch_peft(model):
        raise KeyError
    assert classes(model) == [_peft_layers.Linear, lora.Linear]
    with patch_peft(model):
        unpatch_peft(model)
    assert classes(model) == [lora.Linear] * 2


def test_layers_adapted_later_are_patched_the_next_time():
    model = nn.ModuleDict({"a": adapted(FP32), "b": Net()})
    patch_peft(model)
    model["b"] = adapted(FP32, seed=1)
    assert classes(model) == [_peft_layers.Linear] * 2 + [lora.Linear] * 2
    patch_peft(model)
    assert classes(model) == [_peft_layers.Linear] * 4


def test_a_layer_that_occurs_twice_is_one_row():
    model = adapted(FP32)
    both = nn.ModuleList([model, model])
    assert len(patch_peft(both).rows) == 2


def test_the_report_as_data_and_as_a_table():
    model = adapted(FP32)
    model.add_adapter("dora", LoraConfig(r=3, target_modules=["down"], use_dora=True))
    model.set_adapter("dora")
    report = patch_peft(model)
    up, down = "base_model.model.up", "base_model.model.down"
    assert report.rows == (
        PatchRow(up, "Linear", None, "no adapters are active"),
        PatchRow(down, "Linear", None, "the adapter is a DoraLinearVariant"),
    )
    assert report.fused == 0
    assert json.loads(json.dumps(report.as_dicts()))[0] == {
        "name": up, "layer": "Linear", "operation": None, "reason": "no adapters are active",
    }  # fmt: skip
    assert str(report).splitlines() == [
        "layer                  class   computed by  because",
        "base_model.model.up    Linear  PEFT         no adapters are active",
        "base_model.model.down  Linear  PEFT         the adapter is a DoraLinearVariant",
        "0 of 2 LoRA layers are fused",
    ]
    model.set_adapter("default")
    assert str(patch_peft(model)).splitlines()[-1] == "2 of 2 LoRA layers are fused: 2 by lora_linear"


def test_the_report_keeps_no_model_alive():
    model = adapted(FP32)
    report, layer = patch_peft(model), weakref.ref(layers_of(model)[0])
    del model
    gc.collect()
    assert layer() is None
    with report:
        pass


def test_wrong_models():
    with pytest.raises(ArgumentError, match=r"LoRA layers of PEFT's; found none in Net. Call get_peft_model"):
        patch_peft(Net())
    with pytest.raises(ArgumentError, match=r"must be a torch.nn.Module; got dict"):
        patch_peft({})


def test_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "lora_kernels.interop._peft_layers", None)
    monkeypatch.delattr(lora_kernels.interop, "_peft_layers")
    with pytest.raises(UnsupportedError, match=r"patch_peft needs the layers of PEFT.*pip install 'peft>=0.21'"):
        patch_peft(Net())
    unpatch_peft(Net())


def test_bitsandbytes_is_not_imported_for_other_layers():
    program = (
        "import sys, torch, peft, lora_kernels\n"
        "config = peft.LoraConfig(target_modules=['0'])\n"
        "model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)\n"
        "lora_kernels.patch_peft(model)\n"
        "assert 'lora_kernels.interop._peft_bnb_layers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# Copies and files.


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_are_patched_and_independent(copied):
    model = adapted(FP32)
    patch_peft(model)
    twin = copied(model)
    assert classes(twin) == [_peft_layers.Linear] * 2
    assert_same_numbers(assert_fused(twin, X), model(X))
    unpatch_peft(twin)
    assert classes(twin) == [lora.Linear] * 2
    assert classes(model) == [_peft_layers.Linear] * 2


def test_torch_save_and_load_of_the_whole_model():
    model = adapted(FP32)
    patch_peft(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert classes(loaded) == [_peft_layers.Linear] * 2
    assert_same_numbers(assert_fused(loaded, X), model(X))


def test_a_pickled_model_loads_in_a_process_that_has_not_patched(tmp_path):
    model = adapted(FP32)
    patch_peft(model)
    torch.save((layers_of(model)[0], X, layers_of(model)[0](X).detach()), tmp_path / "layer.pt")
    program = (
        "import torch\n"
        f"layer, x, y = torch.load({str(tmp_path / 'layer.pt')!r}, weights_only=False)\n"
        "torch.testing.assert_close(layer(x), y)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_saved_adapters_are_pefts(tmp_path):
    model = adapted(BF16, use_rslora=True)
    patched = patched_twin(model)
    model.save_pretrained(tmp_path / "stock")
    patched.save_pretrained(tmp_path / "patched")
    weights = [(tmp_path / of / "adapter_model.safetensors").read_bytes() for of in ("stock", "patched")]
    assert weights[0] == weights[1]
    configs = [json.loads((tmp_path / of / "adapter_config.json").read_text()) for of in ("stock", "patched")]
    for config in configs:  # PEFT writes a set, and a copy of a set may have another order, by the hash seed
        config["target_modules"].sort()
    assert configs[0] == configs[1]
    base = copy.deepcopy(model).unload()
    loaded = PeftModel.from_pretrained(base, tmp_path / "patched")
    x = X.bfloat16()
    assert_same_numbers(loaded(x), model.eval()(x))
    patch_peft(loaded)
    assert_same_numbers(assert_fused(loaded, x), patched.eval()(x))


def test_state_dicts_go_both_ways():
    model, other = adapted(FP32, seed=0), adapted(FP32, seed=1)
    patch_peft(other)
    other.load_state_dict(model.state_dict())
    assert_close(assert_fused(other, X), model(X))
    fresh = adapted(FP32, seed=2)
    fresh.load_state_dict(other.state_dict())
    assert_same_numbers(fresh(X), model(X))


# Merging.


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_merge_unmerge_and_unload(safe, kind):
    model = adapted(FP32, kind=kind)
    patched = patched_twin(model)
    expected = model(X)
    for twin in (model, patched):
        twin.merge_adapter(safe_merge=safe)
    assert_same_numbers(patched(X), model(X))
    for twin in (model, patched):
        twin.unmerge_adapter()
    assert_close(assert_fused(patched, X), expected)
    unloaded = patched.merge_and_unload(safe_merge=safe)
    assert layers_of(unloaded) == []
    assert_same_numbers(unloaded(X), model.merge_and_unload(safe_merge=safe)(X))


def test_a_merged_model_that_is_disabled_unmerges_as_pefts_does():
    model = adapted(FP32)
    patched = patched_twin(model)
    outputs = []
    for twin in (model, patched):
        twin.merge_adapter()
        with twin.disable_adapter():
            outputs.append(twin(X))
    assert_same_numbers(*outputs)


# Several adapters.


def test_adapters_are_added_chosen_disabled_and_deleted():
    model = adapted(FP32)
    patched = patched_twin(model)
    for twin in (model, patched):
        torch.manual_seed(4)
        twin.add_adapter("second", LoraConfig(r=3, target_modules=["up"], init_lora_weights=False, lora_dropout=0.5))
        twin.eval()
    assert_close(assert_fused(patched, X), model(X))
    model.set_adapter("second"), patched.set_adapter("second")
    assert_close(assert_fused(patched, X, count=1), model(X))  # "down" has no such adapter
    with model.disable_adapter(), patched.disable_adapter():
        assert_same_numbers(assert_fused(patched, X, count=0), model(X))
    for twin in (model, patched):
        twin.set_adapter("default")
        twin.delete_adapter("second")
    assert_close(assert_fused(patched, X), model(X))


def test_a_weighted_sum_of_adapters():
    model = adapted(FP32)
    patched = patched_twin(model)
    for twin in (model, patched):
        torch.manual_seed(4)
        twin.add_adapter("second", LoraConfig(r=8, target_modules=["up", "down"], init_lora_weights=False))
        twin.add_weighted_adapter(["default", "second"], [0.3, 0.7], "sum", combination_type="cat")
        twin.set_adapter("sum")
    assert_close(assert_fused(patched, X), model(X))


def test_adapters_mixed_in_a_batch():
    model = adapted(FP32)
    torch.manual_seed(4)
    model.add_adapter("second", LoraConfig(r=3, target_modules=["up"], init_lora_weights=False))
    model.eval()
    patched = patched_twin(model)
    names = ["default", "second", "__base__", "default"]
    assert_same_numbers(assert_fused(patched, X, adapter_names=names, count=0), model(X, adapter_names=names))
    assert_fused(patched, X)  # PEFT's hooks are gone after the call


@pytest.mark.parametrize("prepared", [False, True])
def test_hot_swap(tmp_path, prepared):
    adapted(FP32, seed=1, r=4, lora_alpha=32).save_pretrained(tmp_path)
    model = adapted(FP32).eval()
    patched = patched_twin(model)
    if prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=10)
        prepare_model_for_compiled_hotswap(patched, target_rank=10)
    before = assert_fused(patched, X)
    assert_close(before, model(X))
    for twin in (model, patched):
        hotswap_adapter(twin, tmp_path, adapter_name="default")
    assert_close(assert_fused(patched, X), model(X))
    assert not torch.allclose(model(X), before)


# Whole models.

# PEFT 0.21 asks Transformers 5.23 for an attribute by its old name, and users know the method by its own.
by_its_old_name = pytest.mark.filterwarnings(r"ignore:`\w*gradient_checkpointing\w*` is deprecated:FutureWarning")


def tiny_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip


IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def test_transformers_add_adapter():
    """No PeftModel around it: bare layers in a Transformers model."""
    model = tiny_llama()
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    patched = patched_twin(model)
    assert {row.operation for row in patch_peft(patched).rows} == {"lora_linear"}
    assert_close(assert_fused(patched, IDS, count=4).logits, model(IDS).logits)
    patched.disable_adapters()
    assert_fused(patched, IDS, count=0)


@by_its_old_name
def test_training_steps_with_gradient_checkpointing_and_generation():
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(tiny_llama(), config)
    patched = patched_twin(model)
    losses = []
    for twin in (model, patched):
        twin.gradient_checkpointing_enable({"use_reentrant": False})
        twin.enable_input_require_grads()
        twin.train()
        optimizer = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.1)
        losses.append([])
        for _ in range(3):
            loss = twin(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][2] < losses[0][0]
    stock, ours = (twin.eval().generate(input_ids=IDS, max_new_tokens=5, do_sample=False) for twin in (model, patched))
    assert torch.equal(stock, ours)


@by_its_old_name
def test_gpt2():
    torch.manual_seed(0)
    base = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    )
    config = LoraConfig(
        r=4, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(base, config).eval()
    patched = patched_twin(model)
    assert_close(assert_fused(patched, IDS, count=8).logits, model(IDS).logits)


def test_an_optimiser_step_reaches_the_patched_layers():
    """Adapters are read at each call, not when the model was patched."""
    model = adapted(FP32)
    patched = patched_twin(model)
    for twin in (model, patched):
        optimizer = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=1e-2)
        for seed in range(3):
            run(twin, X, seed=seed)
            optimizer.step()
    torch.testing.assert_close(patched(X), model(X), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(model(X), adapted(FP32)(X), rtol=1e-2)


def test_a_forward_that_outlives_the_patch():
    """accelerate wraps a layer's bound forward; after unpatch_peft that is still ours, bound to a layer of PEFT's."""
    model = adapted(FP32)
    patch_peft(model)
    bound = [layer.forward for layer in layers_of(model)]
    unpatch_peft(model)
    with fused_calls() as calls:
        for layer, forward in zip(layers_of(model), bound, strict=True):
            x = inputs(FP32, features=layer.in_features)
            assert_same_numbers(forward(x), layer(x))
    assert calls.operations == []
