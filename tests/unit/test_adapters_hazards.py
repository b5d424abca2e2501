"""Where adapters of whole models could go wrong without a sound: each was seen to, once."""

import copy
import io
import json
import os
import pickle

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lora_kernels import (
    AdapterFileError,
    ArgumentError,
    DtypeError,
    LoRALinear,
    UnsupportedError,
    add_lora,
    load_lora,
    merge_lora,
    save_lora,
    set_adapter,
    unload_lora,
)
from tests.equality import assert_same_numbers, differ


def adapted(*names: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))
    for name in names:
        add_lora(model, r=2, target_modules="all-linear", adapter_name=name, init_lora_weights=False)
    return model


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_ddp_is_not_given_an_adapter_that_it_would_not_synchronise(tmp_path):
    model = adapted("a", "b")
    save_lora(model, tmp_path / "a", adapter_name="a")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wrapped = DistributedDataParallel(model)
    set_adapter(wrapped, "b")  # which is the active one
    told = r"^adapter_name must be the active adapter of a model in DistributedDataParallel, .*got 'a'"
    for call in (lambda: set_adapter(wrapped, "a"), lambda: load_lora(wrapped, tmp_path / "a", adapter_name="a")):
        with pytest.raises(ArgumentError, match=told):
            call()
    assert model[0].active_adapter == "b"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    set_adapter(wrapped, None)


def test_merging_under_autocast_rounds_nothing():
    inside, outside = adapted("default"), adapted("default")
    with torch.autocast("cpu", torch.bfloat16):
        merge_lora(inside)
    merge_lora(outside)
    assert_same_numbers(inside[0].weight, outside[0].weight)


def test_an_encoder_takes_padding_in_eval_mode_and_is_restored():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x, padding = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    attributes, dense = set(vars(encoder)), copy.deepcopy(encoder)
    dense.use_nested_tensor = False  # nested tensors warn that they are a prototype
    with torch.no_grad():
        expected = dense(x, src_key_padding_mask=padding)[~padding]
        add_lora(encoder, r=2, target_modules=["linear1", "linear2"])
        actual = encoder(x, src_key_padding_mask=padding)[~padding]
    # The fast path sums in another order; two layers of some 200 roundings in each element.
    torch.testing.assert_close(actual, expected, rtol=0, atol=200 * 2**-24 * expected.abs().max().item())
    assert not encoder.use_nested_tensor
    unload_lora(encoder)
    assert encoder.use_nested_tensor
    assert set(vars(encoder)) == attributes


def test_a_nested_tensor_is_refused_by_name():
    model = adapted("default")
    with pytest.raises(UnsupportedError, match=r"^x must be a dense tensor; got a nested one.*enable_nested_tensor"):
        model[0](torch.nested.nested_tensor([torch.randn(2, 16), torch.randn(3, 16)], layout=torch.jagged))


def interrupt_after(renames, monkeypatch):
    replace, done = os.replace, []

    def interrupted(source, target):
        replace(source, target)
        done.append(target)
        if len(done) == renames:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)


@pytest.mark.parametrize("renames", [1, 2, 3, 4])
def test_a_save_interrupted_after_a_rename_keeps_the_old_adapter(tmp_path, monkeypatch, renames):
    model = adapted("default")
    save_lora(model, tmp_path)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        model[0].lora_A.add_(1)
    interrupt_after(renames, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        save_lora(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


@pytest.mark.parametrize("renames", [1, 2])
def test_a_first_save_interrupted_after_a_rename_leaves_nothing(tmp_path, monkeypatch, renames):
    interrupt_after(renames, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        save_lora(adapted("default"), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["parameters", "settings", "s", "name"])
def test_any_adapter_name_finds_its_place(name):
    model = adapted(name)
    assert model[0].adapters == (name,)
    assert model(torch.randn(2, 16)).shape == (2, 4)


class Commented(nn.Linear):
    """Nothing that a plain linear does not do."""

    def __init__(self) -> None:
        super().__init__(16, 16)


class Helpful(nn.Linear):
    """More than a linear does, and all of that as a linear does it."""

    unit = "km"

    def norm(self):
        return self.weight.norm() + len(self.unit)

    @property
    def shape(self):
        return tuple(self.weight.shape)

    def extra_repr(self):
        return f"{super().extra_repr()}, unit={self.unit}"

    def reset_parameters(self):
        nn.init.constant_(self.weight, 2)
        nn.init.zeros_(self.bias)


def test_a_subclass_that_computes_as_a_linear_is_served_and_given_back():
    for made in (Commented(), nn.modules.linear.NonDynamicallyQuantizableLinear(16, 16), Helpful(16, 16)):
        kind, x = type(made), torch.randn(3, 16)
        model = nn.Sequential(made)
        before = model(x)
        add_lora(model, r=2, target_modules=["0"])
        assert isinstance(made, LoRALinear)
        assert isinstance(made, kind)
        assert_same_numbers(model(x), before)
        unload_lora(model)
        assert type(made) is kind


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def oldest_pickle(model):
    return pickle.loads(pickle.dumps(model, protocol=0))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("twin", [copy.deepcopy, pickled, oldest_pickle, saved])
@pytest.mark.parametrize("merged", [False, True])
def test_methods_of_a_subclass_stay(twin, merged):
    model, x = nn.Sequential(Helpful(16, 24)), torch.randn(3, 16)
    add_lora(model, r=2, target_modules=["0"], init_lora_weights=False)
    add_lora(model, r=2, target_modules=["0"], init_lora_weights=False, adapter_name="second")
    if merged:
        merge_lora(model)
    other = twin(model)
    assert type(other[0]) is type(model[0])
    assert type(other[0]).__module__ == Helpful.__module__
    assert_same_numbers(other(x), model(x))
    for each in (model[0], other[0]):
        assert each.extra_repr().startswith("in_features=16, out_features=24, bias=True, unit=km, r=2, lora_alpha=8, ")
        assert (each.shape, each.norm()) == ((24, 16), each.weight.norm() + 2)
        each.unit = "m"
    unload_lora(model)
    assert type(model[0]) is Helpful
    assert isinstance(other[0], LoRALinear)
    unload_lora(other)
    assert type(other[0]) is Helpful
    assert other[0].norm() == other[0].weight.norm() + 1


def test_a_subclass_resets_its_weight_in_its_way():
    model = nn.Sequential(Helpful(16, 24))
    add_lora(model, r=2, target_modules=["0"], init_lora_weights=False)
    lora_A = model[0].lora_A.clone()
    merge_lora(model)
    nn.init.zeros_(model[0].weight)
    model[0].reset_parameters()
    assert (model[0].weight == 2).all()
    assert not model[0].merged
    assert differ(model[0].lora_A, lora_A)


def test_what_is_put_on_top_of_a_subclass_decides_about_its_copies():
    model = nn.Sequential(Helpful(16, 24))
    add_lora(model, r=2, target_modules=["0"])
    model[0].__class__ = type("OnTop", (type(model[0]),), {})  # as fully_shard makes one
    assert type(copy.deepcopy(model)[0]) is type(model[0])
    with pytest.raises(pickle.PicklingError, match="OnTop"):
        pickle.dumps(model)
    nn.utils.parametrize.register_parametrization(model[0], "bias", nn.Identity())
    with pytest.raises(RuntimeError, match="parametrized modules is only supported through state_dict"):
        pickle.dumps(model)


def subclass(**members):
    kind = type("Sub", (nn.Linear,), {})
    linear = kind(16, 16)
    for name, member in members.items():  # now, since some would keep nn.Linear from making itself
        setattr(kind, name, member)
    return linear


class Before(nn.Module):
    def __call__(self, x):
        return 2 * super().__call__(x)


class After:
    def __getattribute__(self, name):
        return super().__getattribute__(name)


class Beside(nn.Linear, Before):
    pass


class Beneath(nn.Linear, After):
    pass


def nothing(self, *args):
    return None


OF_A_LINEAR = {
    "forward": nothing,
    "__call__": nothing,
    "_call_impl": nothing,
    "__getattr__": nn.Module.__getattr__,
    "__getattribute__": object.__getattribute__,
    "__setattr__": nn.Module.__setattr__,
    "weight": property(nothing),
    "bias": None,
    "in_features": 16,
    "out_features": property(lambda self: 16, nothing),
    "training": property(nothing, nothing),
    "_apply": nothing,
    "to": nothing,
    "train": nothing,
    "state_dict": nothing,
    "_save_to_state_dict": nothing,
    "_load_from_state_dict": nothing,
    "_version": 2,
    "__deepcopy__": nothing,
    "__getstate__": nothing,
    "__torch_function__": None,
}


@pytest.mark.parametrize("name", OF_A_LINEAR)
def test_a_subclass_that_changes_what_a_linear_does_is_refused(name):
    linear = subclass(**{name: OF_A_LINEAR[name]}, helper=nothing)
    refused_by(linear, rf"Sub, which has its own {name}")
    with pytest.raises(DtypeError, match=rf"^linear must be an nn\.Linear with .*got Sub, which has its own {name}\. "):
        LoRALinear.from_linear(linear)


def refused_by(linear, reason):
    model, kind = nn.Sequential(linear), type(linear)
    with pytest.raises(UnsupportedError, match=rf"it matches '0' \({reason}\)"):
        add_lora(model, target_modules=["0"])
    assert type(linear) is kind


def test_what_changes_a_linear_may_come_from_a_second_base():
    refused_by(Beside(16, 16), "Beside, which has its own __call__")
    refused_by(Beneath(16, 16), "Beneath, which has its own __getattribute__")


@pytest.mark.parametrize("name", ["merge", "lora_A", "scaling", "r", "mesh", "adapters", "adapter_second", "_settings"])
def test_names_of_a_lora_layer_are_free_in_what_becomes_one(name):
    reason = f"which has a {name} that LoRALinear needs"
    of_class = subclass(**{name: 3})
    refused_by(of_class, f"Sub, {reason}")
    for value in (3, torch.nn.Parameter(torch.ones(1)), nn.Identity()):
        linear = nn.Linear(16, 16)
        setattr(linear, name, value)
        refused_by(linear, f"Linear, {reason}")
        assert getattr(linear, name) is value
    # The layer that from_linear makes is another one.
    assert LoRALinear.from_linear(of_class, r=2)(torch.ones(1, 16)).shape == (1, 16)
    assert getattr(of_class, name) == 3


@pytest.mark.parametrize("alpha", ["1" + "0" * 400, "1" + "0" * 5000], ids=["beyond a float", "beyond json"])
def test_numbers_beyond_all_measure_are_faults_of_the_file(tmp_path, alpha):
    save_lora(adapted("default"), tmp_path)
    config = tmp_path / "adapter_config.json"
    text = json.dumps(json.loads(config.read_text()) | {"lora_alpha": 12345})
    config.write_text(text.replace("12345", alpha))
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json: "):
        load_lora(adapted(), tmp_path)
