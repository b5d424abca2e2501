"""Where adapters of whole models could go wrong without a sound: each was seen to, once."""

import copy
import json
import os

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lora_kernels import (
    AdapterFileError,
    ArgumentError,
    UnsupportedError,
    add_lora,
    load_lora,
    merge_lora,
    save_lora,
    set_adapter,
    unload_lora,
)
from tests.equality import assert_same_numbers


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


class Doubled(nn.Linear):
    def __call__(self, x):
        return super().__call__(x) * 2


class Commented(nn.Linear):
    """Nothing that a plain linear does not do."""

    def __init__(self) -> None:
        super().__init__(16, 16)


def test_a_subclass_with_ways_of_its_own_is_refused():
    with pytest.raises(UnsupportedError, match=r"'0' \(Doubled, which adds __call__ to nn.Linear\)"):
        add_lora(nn.Sequential(Doubled(16, 16)), target_modules=["0"])
    model = nn.Sequential(Commented())
    add_lora(model, target_modules=["0"])
    unload_lora(model)
    assert type(model[0]) is Commented


@pytest.mark.parametrize("alpha", ["1" + "0" * 400, "1" + "0" * 5000], ids=["beyond a float", "beyond json"])
def test_numbers_beyond_all_measure_are_faults_of_the_file(tmp_path, alpha):
    save_lora(adapted("default"), tmp_path)
    config = tmp_path / "adapter_config.json"
    text = json.dumps(json.loads(config.read_text()) | {"lora_alpha": 12345})
    config.write_text(text.replace("12345", alpha))
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json: "):
        load_lora(adapted(), tmp_path)
