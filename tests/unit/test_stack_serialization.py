"""What is saved, copied, moved and converted: state_dicts, pickles, compiled modules, meta tensors, dtypes, devices."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from lora_kernels import (
    LoRALinear,
    UnsupportedError,
    add_lora,
    load_lora,
    merge_lora,
    save_lora,
    set_adapter,
    unmerge_lora,
)
from lora_kernels.nn.adapter import move_scalings
from tests.adapter_models import Stack
from tests.equality import assert_same_numbers, differ
from tests.stack_cases import compiler_warnings

NAMES = ("default", "french")


def two_adapters(seed=0, *, tensors=False) -> Stack:
    """Two adapters, "french" active; the scalings as numbers or as tensors."""
    torch.manual_seed(seed)
    model = Stack()
    for name in NAMES:
        add_lora(model, r=2, target_modules=["up", "head"], init_lora_weights=False, adapter_name=name)
        for layer in layers_of(model) if tensors else ():
            layer.scaling = torch.tensor(layer.scaling)
    return model


def layers_of(model) -> list[LoRALinear]:
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


def read_back(state):
    """Through a file, as weights only."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def outputs(model, x) -> list[torch.Tensor]:
    """Of each adapter in turn; the last remains active."""
    found = []
    for name in NAMES:
        set_adapter(model, name)
        found.append(model(x).detach())
    return found


@pytest.mark.parametrize("meta", [False, True], ids=["in place", "assigned to a model on meta"])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "tensors"])
def test_a_state_dict_of_several_adapters_as_weights_only(tensors, merged, meta):
    model, x = two_adapters(tensors=tensors), torch.randn(3, 12)
    expected = outputs(model, x)
    if merged:
        merge_lora(model)
    state = read_back(model.state_dict())
    # Scalings are no weights: they belong to the configuration, as in PEFT's files.
    assert {key.rpartition(".")[2] for key in state} == {"weight", "bias", "lora_A", "lora_B"}
    if meta:
        with torch.device("meta"):
            other = two_adapters()
        assert all(p.is_meta for p in other.parameters())
    else:
        other = two_adapters(seed=1)
        assert differ(other(x), model(x))
    trained = {name for name, p in other.named_parameters() if p.requires_grad}
    assert str(other.load_state_dict(state, assign=meta)) == "<All keys matched successfully>"
    assert {name for name, p in other.named_parameters() if p.requires_grad} == trained
    assert all(type(p) is nn.Parameter for p in other.parameters())
    for found, wanted in zip(outputs(other, x), expected, strict=True):
        assert_same_numbers(found, wanted)


def test_assigning_to_a_merged_model_merges_what_was_assigned():
    model, other, x = two_adapters(), two_adapters(seed=1), torch.randn(3, 12)
    merge_lora(model), merge_lora(other)
    other.load_state_dict(model.state_dict(), assign=True)
    assert_same_numbers(other(x), model(x))
    unmerge_lora(model), unmerge_lora(other)
    assert_same_numbers(other(x), model(x))


def test_a_model_made_on_meta_takes_its_base_and_then_an_adapter_file(tmp_path):
    base = Stack()
    weights = read_back(base.state_dict())
    model, x = copy.deepcopy(base), torch.randn(3, 12)
    add_lora(model, r=2, target_modules=["up"], init_lora_weights=False)
    save_lora(model, tmp_path)
    with torch.device("meta"):
        empty = Stack()
    empty.load_state_dict(weights, assign=True)
    load_lora(empty, tmp_path)
    assert_same_numbers(empty(x), model(x))
    # Or everything made on meta, then given memory and values.
    with torch.device("meta"):
        empty = two_adapters()
    empty.to_empty(device="cpu")
    for parameter in empty.parameters():
        nn.init.constant_(parameter, float("nan"))  # as the memory may be
    for module in empty.modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            module.reset_parameters()
    # The active adapter alone is reset, as the docstring says.
    unset = {name for name, p in empty.named_parameters() if not p.isfinite().all()}
    assert unset == {name for name, _ in empty.named_parameters() if "lora" in name and "french" not in name}
    assert empty(x).isfinite().all()


@compiler_warnings
@pytest.mark.parametrize("how", ["torch.compile", "Module.compile"])
def test_copies_of_a_compiled_model(how):
    torch.compiler.reset()
    model, x = two_adapters(), torch.randn(3, 12)
    if how == "torch.compile":
        fast = torch.compile(model, backend="aot_eager", fullgraph=True)
        prefix = "_orig_mod."
    else:
        model.compile(backend="aot_eager", fullgraph=True)
        fast, prefix = model, ""
    expected = fast(x)
    assert set(fast.state_dict()) == {prefix + name for name in two_adapters().state_dict()}
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert_same_numbers(other(x), expected)
        for layer in layers_of(other):
            nn.init.zeros_(layer.lora_B)
        assert differ(other(x), expected)
        assert_same_numbers(fast(x), expected)
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("merged", [False, True])
def test_conversions_take_all_adapters_and_keep_scalings_in_tensors(merged, dtype):
    model, x = two_adapters(tensors=True), torch.randn(3, 12)
    scalings = [layer.scaling for layer in layers_of(model)]
    twin = {name: p.detach().to(dtype) for name, p in model.named_parameters()}
    if merged:
        merge_lora(model)
    model.to(dtype)
    assert model(x.to(dtype)).dtype == dtype
    if merged:
        assert {p.dtype for p in model.parameters()} == {dtype}
        unmerge_lora(model)
    for name, p in model.named_parameters():
        assert p.dtype == dtype
        assert torch.equal(p, twin[name]), name
    for layer, scaling in zip(layers_of(model), scalings, strict=True):
        assert layer.scaling is scaling
        assert scaling.dtype == torch.float32
    model.to("meta")  # where the value of a scaling would be lost
    assert all(layer.scaling is scaling for layer, scaling in zip(layers_of(model), scalings, strict=True))
    assert all(scaling.item() == 4.0 for scaling in scalings)


def test_scalings_in_tensors_follow_to_the_device_of_the_adapter_that_waits_too(monkeypatch):
    model, moved = two_adapters(tensors=True), []
    monkeypatch.setattr("lora_kernels.nn.linear.move_scalings", lambda scalings, fn: moved.extend(scalings))
    model.to("cpu")
    tensors = {id(scaling) for scaling in moved if isinstance(scaling, torch.Tensor)}
    assert len(tensors) == len(NAMES) * len(layers_of(model))
    # No second device here: fn says where a parameter has gone, and a tensor on meta is one that has not arrived.
    scaling = torch.tensor(2.0)
    move_scalings([scaling, 3.0], lambda t: t.to("meta"))
    assert scaling.device.type == "cpu"
    assert scaling.item() == 2.0


def test_an_optimiser_goes_on_after_a_conversion():
    # As for every module: parameters stay the same objects. Its state stays in the old dtype, which AdamW refuses.
    model, x = two_adapters(), torch.randn(3, 12)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        assert all(p is q for p, q in zip(trained, (p for p in model.parameters() if p.requires_grad), strict=True))
        before = [p.detach().clone() for p in trained]
        optimiser.zero_grad()
        model(x.to(dtype)).square().sum().backward()
        optimiser.step()
        assert not any(torch.equal(p, q) for p, q in zip(trained, before, strict=True))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("how", ["parametrized", "pruned"])
def test_a_weight_that_is_computed_is_used_and_not_merged(how):
    layer, x = LoRALinear(12, 9, r=2, init_lora_weights=False), torch.randn(3, 12)
    expected = layer(x) + x @ layer.weight.T
    if how == "parametrized":
        parametrize.register_parametrization(layer, "weight", Doubled())
    else:
        expected -= x @ layer.weight.T
        prune.random_unstructured(layer, "weight", 0.5)
        expected += x @ (layer.weight - layer.weight_orig).T
    torch.testing.assert_close(layer(x), expected)
    state = {name: p.detach().clone() for name, p in layer.named_parameters()}
    with pytest.raises(UnsupportedError, match=r"^weight must be a parameter .*to be merged; got .*computed.* Remove"):
        layer.merge()
    assert not layer.merged
    assert all(torch.equal(p, state[name]) for name, p in layer.named_parameters())
    if how == "parametrized":
        parametrize.remove_parametrizations(layer, "weight")
    else:
        prune.remove(layer, "weight")
    layer.merge()
    torch.testing.assert_close(layer(x), expected)


def test_a_parametrized_adapter_is_used_trained_and_merged():
    layer, x = LoRALinear(12, 9, r=2, init_lora_weights=False), torch.randn(3, 12)
    base = nn.functional.linear(x, layer.weight, layer.bias)
    expected = base + 2 * (layer(x) - base)
    parametrize.register_parametrization(layer, "lora_A", Doubled())
    torch.testing.assert_close(layer(x), expected)
    layer(x).sum().backward()
    assert layer.parametrizations.lora_A.original.grad.any()
    layer.merge()
    torch.testing.assert_close(layer(x), expected)
