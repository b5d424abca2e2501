"""Several adapters on one base: switching, what stays the same meanwhile, and what a compiled model makes of it."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from lora_kernels import (
    ArgumentError,
    DtypeError,
    LoRALinear,
    add_lora,
    delete_adapter,
    load_lora,
    merge_lora,
    save_lora,
    set_adapter,
    unmerge_lora,
)
from tests.adapter_models import Stack, state_of
from tests.equality import assert_same_numbers, differ

# Compilation warns in torch's own code, and these are not ours to mend.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script(_method)?` is deprecated:DeprecationWarning",
    "ignore:.*autograd.function.Function'> should not be instantiated:DeprecationWarning",  # Dynamo, for its ctx
)

NAMES = ("default", "french", "train")
RANKS = {"default": 2, "french": 3, "train": 4}
TARGETS = {"default": ["up"], "french": ["up", "head"], "train": ["up"]}


def several(names=NAMES) -> Stack:
    """A model with adapters of different ranks, whose updates are not zero."""
    torch.manual_seed(0)
    model = Stack()
    for name in names:
        add_lora(model, r=RANKS[name], target_modules=TARGETS[name], adapter_name=name, init_lora_weights=False)
    return model


def output_of(name, x) -> torch.Tensor:
    """What the model computes that has this adapter alone."""
    model, alone = several(), Stack()
    alone.load_state_dict({key: value for key, value in model.state_dict().items() if "lora_" not in key})
    add_lora(alone, r=RANKS[name], target_modules=TARGETS[name])
    for key, layer in alone.named_modules():
        if isinstance(layer, LoRALinear):
            lora_A, lora_B = model.get_submodule(key).parameters_of(name)
            layer.lora_A.data, layer.lora_B.data = lora_A.data, lora_B.data
    return alone(x)


@pytest.mark.parametrize("name", NAMES)
def test_the_active_adapter_is_the_only_one_that_counts(name):
    model, x = several(), torch.randn(3, 12)
    set_adapter(model, name)
    assert_same_numbers(model(x), output_of(name, x))


def test_the_newest_is_the_active_one_and_none_gives_the_base():
    model, x = several(), torch.randn(3, 12)
    layer = model.layers[0].up
    assert layer.active_adapter == "train"
    assert layer.adapters == NAMES
    assert (layer.r, layer.lora_A.shape, layer.lora_B.shape) == (4, (4, 12), (12, 4))
    assert (model.head.active_adapter, model.head.r, model.head.adapters) == (None, 0, ("french",))
    set_adapter(model, None)
    base = Stack()
    base.load_state_dict({key: value for key, value in model.state_dict().items() if "lora_" not in key})
    assert_same_numbers(model(x), base(x))
    assert not any(p.requires_grad for p in model.parameters())
    assert "no active adapter" in repr(model.head)
    with pytest.raises(AttributeError, match="lora_A"):
        _ = model.head.lora_A


def test_the_numbers_are_the_active_adapter_s():
    torch.manual_seed(0)
    layer = LoRALinear(6, 4, r=2, lora_alpha=4, lora_dropout=0.1, backend="torch")
    layer.add_adapter("b", r=3, lora_alpha=6, use_rslora=True, init_lora_weights="gaussian")
    assert (layer.r, layer.lora_dropout, layer.backend, layer.use_rslora) == (3, 0.0, "auto", True)
    layer.scaling = 0.25
    layer.set_adapter("default")
    assert (layer.r, layer.lora_alpha, layer.lora_dropout, layer.backend, layer.scaling) == (2, 4, 0.1, "torch", 2.0)
    layer.set_adapter("b")
    assert (layer.r, layer.scaling) == (3, 0.25)
    assert "active_adapter='b'" in repr(layer)
    assert "adapter_b" in repr(layer)


def test_names_and_parameters_stay_whichever_is_active():
    model = several()
    parameters = {name: id(p) for name, p in model.named_parameters()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert {"layers.0.up.lora_A", "layers.0.up.adapter_french.lora_A", "layers.1.up.adapter_train.lora_B"} < set(state)
    for name in (*NAMES, None):
        set_adapter(model, name)
        assert {key: id(p) for key, p in model.named_parameters()} == parameters
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_keys_depend_on_names_and_not_on_the_order_of_adding():
    assert set(several(("french", "default", "train")).state_dict()) == set(several().state_dict())


def test_a_state_dict_is_loaded_whichever_is_active():
    model, x = several(), torch.randn(3, 12)
    other = several()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    set_adapter(other, "french")
    other.load_state_dict(model.state_dict())
    set_adapter(model, "french")
    assert_same_numbers(other(x), model(x))


@pytest.mark.parametrize("name", ["default", "french"])
def test_a_state_dict_loaded_into_a_merged_model_is_merged(name):
    model, x = several(), torch.randn(3, 12)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    for each in (model, other):
        set_adapter(each, name)
        merge_lora(each)
    other.load_state_dict(model.state_dict())
    assert_same_numbers(other(x), model(x))
    unmerge_lora(model), unmerge_lora(other)
    assert_same_numbers(other(x), model(x))


def test_switching_under_functional_call_and_conversion():
    model, x = several(), torch.randn(3, 12)
    set_adapter(model, "french")
    zeros = {name: torch.zeros_like(p) if "french" in name else p for name, p in model.named_parameters()}
    with torch.no_grad():
        y = torch.func.functional_call(model, zeros, (x,))
    set_adapter(model, None)
    assert_same_numbers(y, model(x))
    set_adapter(model, "french")
    model.to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(x.double()).dtype == torch.float64
    set_adapter(model.to("meta").to_empty(device="cpu"), "french")
    assert model.head.lora_A is model.head.adapter_french.lora_A
    assert model.head.lora_A.device.type == "cpu"


def test_inactive_adapters_wait_with_what_they_required():
    model = several()
    layer = model.layers[0].up
    layer.lora_A.requires_grad_(False)  # of "train"
    set_adapter(model, "default")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"layers.{i}.up.{part}" for i in (0, 1) for part in ("lora_A", "lora_B")}
    set_adapter(model, "train")
    assert (layer.lora_A.requires_grad, layer.lora_B.requires_grad) == (False, True)


def test_a_second_adapter_leaves_what_else_trains_alone():
    model = Stack()
    add_lora(model, target_modules=["up"])
    model.head.requires_grad_(True)
    add_lora(model, target_modules=["up"], adapter_name="b")
    assert model.head.weight.requires_grad
    assert not model.layers[0].up.weight.requires_grad


def test_an_optimiser_keeps_its_parameters():
    model = several()
    optimisers = {}
    for name in NAMES:
        set_adapter(model, name)
        optimisers[name] = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for name in ("default", "french", "default"):
        set_adapter(model, name)
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        optimisers[name].zero_grad()
        model(torch.randn(3, 12)).square().sum().backward()
        optimisers[name].step()
        moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
        assert moved == {key for key, p in model.named_parameters() if p.requires_grad}
        assert all(name in key or (name == "default" and "adapter_" not in key) for key in moved)


@pytest.mark.parametrize("name", NAMES)
def test_a_merged_model_stays_merged_when_switched(name):
    model, x = several().eval(), torch.randn(3, 12)
    base = {key: value.clone() for key, value in model.state_dict().items()}
    set_adapter(model, name)
    merge_lora(model)
    expected = model(x)
    unmerge_lora(model)
    set_adapter(model, "default")
    merge_lora(model)
    for step in ("french", "default", name, name):
        set_adapter(model, step)
    assert model.layers[0].up.merged
    assert model.head.merged == (name == "french")
    assert_same_numbers(model(x), expected)
    set_adapter(model, None)
    assert not model.layers[0].up.merged
    set_adapter(model, name)
    assert not model.layers[0].up.merged
    assert all(torch.equal(value, base[key]) for key, value in model.state_dict().items())


def test_an_adapter_added_to_a_merged_model_can_be_trained():
    model = several(("default",))
    merge_lora(model)
    add_lora(model, r=2, target_modules=["head"], adapter_name="b", init_lora_weights=False)
    assert not model.layers[0].up.merged
    assert not model.head.merged
    model(torch.randn(2, 12)).sum().backward()
    assert model.head.lora_A.grad.any()


def test_delete():
    model, x = several(), torch.randn(3, 12)
    delete_adapter(model, "french")
    assert model.head.adapters == ()
    assert not any("french" in key for key in model.state_dict())
    assert_same_numbers(model(x), output_of("train", x))
    merge_lora(model)
    delete_adapter(model, "train")
    layer = model.layers[0].up
    assert not layer.merged
    assert layer.active_adapter is None
    set_adapter(model, "default")
    assert_same_numbers(model(x), output_of("default", x))
    delete_adapter(model, "default")
    assert "layers.0.up.lora_A" not in model.state_dict()
    set_adapter(model, None)
    add_lora(model, r=3, target_modules=["up"])
    assert layer.adapters == ("default",)
    assert layer.lora_A.shape == (3, 12)


def test_default_added_after_another():
    layer = LoRALinear(6, 4, r=2)
    layer.add_adapter("b", r=3)
    layer.delete_adapter("default")
    assert layer.lora_A.shape == (3, 6)
    assert set(layer.state_dict()) == {"weight", "bias", "adapter_b.lora_A", "adapter_b.lora_B"}
    layer.add_adapter("default", r=1)
    assert layer.lora_A.shape == (1, 6)
    layer.set_adapter("b")
    assert layer.lora_A.shape == (3, 6)


def test_unknown_names():
    model = several()
    before = state_of(model)
    for call in (set_adapter, delete_adapter):
        with pytest.raises(ArgumentError, match=r"^adapter_name must be one of the model's adapters, \['default', 'fr"):
            call(model, "english")
        with pytest.raises(ArgumentError, match=r"^model must have LoRA layers"):
            call(Stack(), "default")
    layer = model.layers[0].up
    for call in (layer.set_adapter, layer.delete_adapter, layer.settings_of, layer.parameters_of):
        with pytest.raises(ArgumentError, match=r"^adapter_name must be one of the layer's adapters"):
            call("english")
    with pytest.raises(ArgumentError, match=r"^adapter_name must be new to the layer"):
        layer.add_adapter("french")
    with pytest.raises(ArgumentError, match=r"^adapter_name must be a non-empty string without dots"):
        layer.add_adapter("a.b")
    with pytest.raises(DtypeError, match=r"^adapter_dtype must be"):
        layer.add_adapter("b", adapter_dtype=torch.float16)
    with pytest.raises(ArgumentError, match=r"^r must be"):
        layer.add_adapter("b", r=0)
    assert state_of(model) == before


def test_merging_without_an_active_adapter():
    model = several()
    set_adapter(model, None)
    with pytest.raises(ArgumentError, match=r"^model must have an active adapter to merge; got one with \['default', "):
        merge_lora(model)
    layer = model.layers[0].up
    layer.merge()
    assert not layer.merged


def compiled(model) -> tuple[nn.Module, CompileCounter]:
    torch._dynamo.reset()
    counter = CompileCounter()
    return torch.compile(model, backend=counter, fullgraph=True), counter


def saved(path, **options) -> str:
    torch.manual_seed(1)
    model = Stack()
    add_lora(model, **{"r": 4, "target_modules": ["up", "head"], "init_lora_weights": False, **options})
    save_lora(model, path)
    return str(path)


@pytest.mark.parametrize("train", [False, True])
def test_loading_into_a_compiled_model_does_not_compile_again(tmp_path, train):
    model = Stack().train(train)
    add_lora(model, r=4, target_modules=["up", "head"])
    fast, counter = compiled(model)
    x = torch.randn(3, 12)
    with torch.set_grad_enabled(train):
        before = fast(x)
        load_lora(model, saved(tmp_path))
        with torch._dynamo.config.patch(error_on_recompile=True):
            after = fast(x)
        assert counter.frame_count == 1
        assert differ(after, before)
        assert_same_numbers(after, model(x))
        # Through the compiled module, too.
        load_lora(fast, saved(tmp_path))
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert_same_numbers(fast(x), after)


def test_another_scaling_compiles_once_as_a_number_and_never_as_a_tensor(tmp_path):
    paths = [saved(tmp_path / str(alpha), lora_alpha=alpha) for alpha in (4, 12)]
    x, counts = torch.randn(3, 12), []
    for as_tensor in (False, True):
        model = Stack()
        add_lora(model, r=4, target_modules=["up", "head"])
        if as_tensor:
            for module in model.modules():
                if isinstance(module, LoRALinear):
                    module.scaling = torch.tensor(module.scaling)
        fast, counter = compiled(model)
        fast(x)
        for path in paths:
            load_lora(model, path)
            assert_same_numbers(fast(x), model(x))
        counts.append(counter.frame_count)
        assert float(model.head.scaling) == 3.0
    assert counts == [3, 1]


def test_switching_in_a_compiled_model():
    model, x = Stack(), torch.randn(3, 12)
    for name in ("a", "b", "c", "default"):
        add_lora(model, r=4, target_modules=["up", "head"], adapter_name=name, init_lora_weights=False)
    fast, counter = compiled(model)
    set_adapter(model, "a")
    fast(x)
    for name in ("b", "c", "a"):
        set_adapter(model, name)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert_same_numbers(fast(x), model(x))
    # "default" lives in the layer itself: a second graph, the last.
    for name in ("default", "b", "default", "c"):
        set_adapter(model, name)
        assert_same_numbers(fast(x), model(x))
    assert counter.frame_count == 2
