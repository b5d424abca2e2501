"""`save_lora` and `load_lora` between models of our own; tests/interop has PEFT on the other side."""

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lora_kernels import (
    AdapterFileError,
    ArgumentError,
    DeviceError,
    DtypeError,
    LoRALinear,
    add_lora,
    load_lora,
    merge_lora,
    save_lora,
    set_adapter,
    unmerge_lora,
)
from tests.adapter_models import Block, Stack, state_of
from tests.equality import assert_same_numbers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def trained(base: nn.Module, **options) -> nn.Module:
    model = copy.deepcopy(base)
    add_lora(
        model, **{"r": 3, "lora_alpha": 5, "target_modules": ["up", "head"], "init_lora_weights": False, **options}
    )
    return model


def config_of(directory) -> dict:
    return json.loads((Path(directory) / CONFIG).read_text())


@pytest.fixture
def base() -> Stack:
    torch.manual_seed(0)
    return Stack().eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "lora_dropout": 0.25},
        {"rank_pattern": {"layers.0.up": 1, "head": 7}, "alpha_pattern": {"head": 2.5, "layers.1.up": 4}},
        {"target_modules": "all-linear", "exclude_modules": ["layers.0.attn.q_proj"]},
        {"adapter_name": "french"},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_round_trip(tmp_path, base, x, dtype, options):
    base, x = base.to(dtype), x.to(dtype)
    model = trained(base, **options)
    save_lora(model, tmp_path / "new" / "folder")
    other = copy.deepcopy(base)
    report = load_lora(other, str(tmp_path / "new" / "folder"))
    assert_same_numbers(other(x), model(x))
    assert [m.name for m in report.modules] == [n for n, m in model.named_modules() if isinstance(m, LoRALinear)]
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            twin = other.get_submodule(name)
            assert (twin.r, twin.lora_dropout, twin.scaling) == (layer.r, layer.lora_dropout, layer.scaling)
            assert torch.equal(twin.lora_A, layer.lora_A)
            assert torch.equal(twin.lora_B, layer.lora_B)
            assert twin.lora_A.dtype == layer.lora_A.dtype == dtype
            assert (twin.lora_A.requires_grad, twin.weight.requires_grad, twin.training) == (True, False, False)
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [CONFIG, WEIGHTS]


def test_what_is_in_the_files(tmp_path, base):
    save_lora(trained(base), tmp_path, task_type="CAUSAL_LM", base_model_name_or_path="some/model")
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert {key: file.get_slice(key).get_shape() for key in file.keys()} == {  # noqa: SIM118 - it is no dict
            "base_model.model.head.lora_A.weight": [3, 12],
            "base_model.model.head.lora_B.weight": [9, 3],
            **{f"base_model.model.layers.{i}.up.lora_A.weight": [3, 12] for i in (0, 1)},
            **{f"base_model.model.layers.{i}.up.lora_B.weight": [12, 3] for i in (0, 1)},
        }
    config = config_of(tmp_path)
    expected = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/model",
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["head", "up"],
        "bias": "none",
        "rank_pattern": {},
    }
    assert {key: config[key] for key in expected} == expected


def test_a_transformers_model_says_what_it_is(tmp_path, base):
    base.name_or_path = "some/model"
    save_lora(trained(base), tmp_path)
    assert config_of(tmp_path)["base_model_name_or_path"] == "some/model"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["layers.0.up", "layers.1.up"], ["up"]),
        (["layers.0.up"], ["layers.0.up"]),
        (["head", "layers.1.attn.q_proj"], ["head", "layers.1.attn.q_proj"]),
    ],
)
def test_the_config_names_what_has_an_adapter_as_shortly_as_it_can(tmp_path, base, names, expected):
    save_lora(trained(base, target_modules=names), tmp_path)
    assert config_of(tmp_path)["target_modules"] == expected


def test_names_that_are_suffixes_of_others_make_a_regular_expression(tmp_path, x):
    model = nn.ModuleDict({"up": nn.Linear(12, 12), "block": Block()})
    add_lora(model, target_modules="^up$", r=2)
    save_lora(model, tmp_path)
    assert config_of(tmp_path)["target_modules"] == "up"  # of a string, the whole name is matched
    report = load_lora(nn.ModuleDict({"up": nn.Linear(12, 12), "block": Block()}), tmp_path)
    assert [module.name for module in report.modules] == ["up"]


def test_patterns_hold_for_the_layers_that_differ_and_no_others(tmp_path):
    model = nn.ModuleDict({"up": nn.Linear(12, 12), "block": Block(), "blocks": Block()})
    add_lora(model, target_modules=["up", "q_proj"], r=2, rank_pattern={"^up": 3, "q_proj": 4, "block.up": 5})
    save_lora(model, tmp_path)
    assert config_of(tmp_path)["r"] == 4
    assert config_of(tmp_path)["rank_pattern"] == {"^up": 3, "^block\\.up": 5, "^blocks\\.up": 2}
    other = nn.ModuleDict({"up": nn.Linear(12, 12), "block": Block(), "blocks": Block()})
    found = {module.name: module.r for module in load_lora(other, tmp_path).modules}
    assert found == {"up": 3, "block.attn.q_proj": 4, "block.up": 5, "blocks.attn.q_proj": 4, "blocks.up": 2}


@pytest.mark.parametrize("rslora", [False, True])
def test_layers_made_and_scaled_by_hand(tmp_path, x, rslora):
    torch.manual_seed(0)
    model = nn.Sequential(
        LoRALinear(12, 12, r=2, lora_alpha=3, use_rslora=rslora, init_lora_weights=False),
        LoRALinear(12, 12, r=4, use_rslora=True, init_lora_weights=False),
        nn.Linear(12, 12),
        LoRALinear(12, 12, r=2, init_lora_weights=False, use_rslora=rslora, lora_alpha=7),
    )
    model[3].scaling = 0.3
    model[1].scaling = torch.tensor(model[1].scaling)
    save_lora(model, tmp_path)
    other = nn.Sequential(*(nn.Linear(12, 12) for _ in range(4)))
    other.load_state_dict({key: value for key, value in model.state_dict().items() if "lora_" not in key})
    load_lora(other, tmp_path)
    for index in (0, 1, 3):
        assert other[index].scaling == pytest.approx(float(model[index].scaling), rel=1e-15 if index != 1 else 1e-7)
    torch.testing.assert_close(other(x), model(x))


def test_a_merged_model_saves_the_adapter_and_not_the_sum(tmp_path, base, x):
    model = trained(base)
    save_lora(model, tmp_path / "a")
    merge_lora(model)
    save_lora(model, tmp_path / "b")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_which_adapter_is_saved(tmp_path, base, x):
    model = trained(base)
    add_lora(model, r=2, target_modules=["q_proj"], adapter_name="b", init_lora_weights=False)
    save_lora(model, tmp_path / "active")
    save_lora(model, tmp_path / "named", adapter_name="default")
    assert config_of(tmp_path / "active")["target_modules"] == ["q_proj"]
    assert config_of(tmp_path / "named")["target_modules"] == ["head", "up"]
    set_adapter(model, None)
    with pytest.raises(ArgumentError, match=r"^adapter_name must say which adapter to save .* active ones are \[\]"):
        save_lora(model, tmp_path / "none")
    with pytest.raises(ArgumentError, match=r"^adapter_name must be one of the model's adapters, .*got 'c'"):
        save_lora(model, tmp_path / "none", adapter_name="c")
    assert not (tmp_path / "none").exists()


def test_what_cannot_be_saved(tmp_path, base):
    with pytest.raises(ArgumentError, match=r"^model must have LoRA layers"):
        save_lora(base, tmp_path)
    with pytest.raises(ArgumentError, match=r"^model must hold its LoRA layers under names"):
        save_lora(LoRALinear(3, 3), tmp_path)
    with pytest.raises(DeviceError, match=r"^lora_A of 'layers.0.up' must hold data to be saved"):
        save_lora(trained(base).to("meta"), tmp_path)
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ArgumentError, match=r"^directory must be a directory, or not exist yet; got the file"):
            save_lora(trained(base), path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_module_at_two_places_is_saved_under_both_names_and_loaded_once(tmp_path, x):
    def shared() -> nn.Sequential:
        torch.manual_seed(0)
        block = Block()
        return nn.Sequential(block, block)

    model = shared()
    add_lora(model, r=2, target_modules=["up"], init_lora_weights=False)
    save_lora(model, tmp_path)
    assert sorted(load_file(tmp_path / WEIGHTS)) == [
        f"base_model.model.{i}.up.{part}.weight" for i in (0, 1) for part in ("lora_A", "lora_B")
    ]
    other = shared()
    load_lora(other, tmp_path)
    assert_same_numbers(other(x), model(x))
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["base_model.model.1.up.lora_B.weight"] += 1
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(
        AdapterFileError, match=r"'base_model.model.1.up.lora_B.weight' must equal '.*0.up.lora_B.weight'"
    ):
        load_lora(shared(), tmp_path)


def test_loading_into_an_adapter_writes_in_place(tmp_path, base, x):
    save_lora(trained(base, lora_alpha=7, use_rslora=True), tmp_path)
    expected = load_and_run(base, tmp_path, x)
    model = trained(base, lora_dropout=0.5)
    ids = {name: id(p) for name, p in model.named_parameters()}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    load_lora(model, tmp_path)
    assert {name: id(p) for name, p in model.named_parameters()} == ids
    assert_same_numbers(model(x), expected)
    assert (model.head.lora_alpha, model.head.use_rslora, model.head.lora_dropout) == (7, True, 0.5)
    assert all(any(p is q for q in model.parameters()) for p in optimiser.param_groups[0]["params"])


def load_and_run(base, path, x, **options):
    model = copy.deepcopy(base)
    load_lora(model, path, **options)
    return model(x)


def test_loading_into_an_inactive_adapter_activates_it(tmp_path, base, x):
    save_lora(trained(base, lora_alpha=7), tmp_path)
    model = trained(base)
    add_lora(model, r=2, target_modules=["q_proj"], adapter_name="b", init_lora_weights=False)
    load_lora(model, tmp_path)
    assert model.head.active_adapter == "default"
    assert_same_numbers(model(x), load_and_run(base, tmp_path, x))
    set_adapter(model, "b")
    assert model.head.active_adapter is None


def test_loading_beside_another_adapter(tmp_path, base, x):
    for name, alpha in (("a", 7), ("b", 9)):
        save_lora(trained(base, lora_alpha=alpha), tmp_path / name)
    model = copy.deepcopy(base)
    outputs = {}
    for name in ("a", "b"):
        load_lora(model, tmp_path / name, adapter_name=name)
        outputs[name] = model(x)
    for name in ("a", "b"):
        set_adapter(model, name)
        assert_same_numbers(model(x), outputs[name])
        assert_same_numbers(model(x), load_and_run(base, tmp_path / name, x))


@pytest.mark.parametrize("name", ["default", "new"])
def test_a_merged_model_is_merged_with_what_is_loaded(tmp_path, base, x, name):
    save_lora(trained(base, lora_alpha=7), tmp_path)
    model = trained(base)
    merge_lora(model)
    load_lora(model, tmp_path, adapter_name=name)
    assert model.head.merged
    fresh = copy.deepcopy(base)
    load_lora(fresh, tmp_path)
    merge_lora(fresh)
    assert_same_numbers(model(x), fresh(x))
    unmerge_lora(model)
    assert torch.equal(model.head.weight, base.head.weight)


@pytest.mark.parametrize(
    ("stored", "layer", "asked", "expected"),
    [
        (torch.float32, torch.bfloat16, None, torch.float32),
        (torch.bfloat16, torch.bfloat16, None, torch.bfloat16),
        (torch.float16, torch.bfloat16, None, torch.float32),
        (torch.bfloat16, torch.float32, None, torch.float32),
        (torch.float32, torch.float64, None, torch.float64),
        (torch.float32, torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.float16, DtypeError),
    ],
)
def test_dtype_of_a_loaded_adapter(tmp_path, base, stored, layer, asked, expected):
    model = trained(base)
    save_lora(model, tmp_path)
    save_file({key: value.to(stored) for key, value in load_file(tmp_path / WEIGHTS).items()}, tmp_path / WEIGHTS)
    other = copy.deepcopy(base).to(layer)
    if isinstance(expected, type):
        with pytest.raises(expected, match=r"^'layers.0.up': adapter_dtype must be"):
            load_lora(other, tmp_path, adapter_dtype=asked)
        return
    load_lora(other, tmp_path, adapter_dtype=asked)
    assert other.head.lora_A.dtype == expected
    assert torch.equal(other.head.lora_A, model.head.lora_A.to(stored).to(expected))


def test_a_minimal_config_of_peft_is_enough(tmp_path, base, x):
    model = trained(base, r=8, lora_alpha=8)
    save_lora(model, tmp_path)
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA", "target_modules": ["up", "head"]}')
    assert_same_numbers(load_and_run(base, tmp_path, x), model(x))
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA"}')  # the keys say which modules
    assert_same_numbers(load_and_run(base, tmp_path, x), model(x))


@pytest.mark.parametrize(
    "change",
    [
        {"layers_to_transform": [1]},
        {"layers_to_transform": 1, "layers_pattern": "layers"},
        {"layers_to_transform": [1, 7], "layers_pattern": ["h", "layers"]},
    ],
)
def test_layers_to_transform(tmp_path, base, x, change):
    base = nn.Sequential(base)  # without layers_pattern, PEFT wants a component before the one that is counted
    model = trained(base, target_modules=["0.layers.1.up"])
    save_lora(model, tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({**config_of(tmp_path), "target_modules": ["up"], **change}))
    assert_same_numbers(load_and_run(base, tmp_path, x), model(x))
    (tmp_path / CONFIG).write_text(
        json.dumps({**config_of(tmp_path), "target_modules": ["up"], **change, "layers_to_transform": [0]})
    )
    with pytest.raises(AdapterFileError, match=r"'base_model.model.0.layers.0.up.lora_A.weight' is missing"):
        load_lora(base, tmp_path)


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_save_that_fails_leaves_the_old_pair(tmp_path, base, monkeypatch, call):
    old, new = trained(base), trained(base, r=5)
    save_lora(old, tmp_path)
    (tmp_path / "README.md").write_text("kept")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    fail_at(monkeypatch, call)
    with pytest.raises(OSError, match="no more"):
        save_lora(new, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("call", [1, 2])
def test_a_first_save_that_fails_leaves_nothing(tmp_path, base, monkeypatch, call):
    fail_at(monkeypatch, call)
    with pytest.raises(OSError, match="no more"):
        save_lora(trained(base), tmp_path)
    assert list(tmp_path.iterdir()) == []


def fail_at(monkeypatch, call: int, for_good: bool = False) -> None:
    """The n-th rename fails; with for_good, everything from there on, as when the process dies."""
    calls, replace = [], os.replace

    def failing(source, target):
        calls.append(target)
        if len(calls) == call or (for_good and len(calls) > call):
            raise OSError("no more")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    if for_good:
        monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
        monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)


@pytest.mark.parametrize("call", [1, 2, 3, 4, 5])
def test_a_save_that_dies_leaves_no_pair_of_two_saves(tmp_path, base, x, monkeypatch, call):
    # Same shapes and another alpha: what a loader could not tell.
    old, new = trained(base), trained(base, lora_alpha=50)
    save_lora(old, tmp_path)
    with monkeypatch.context() as patch:
        fail_at(patch, call, for_good=True)
        if call < 5:
            with pytest.raises(OSError, match="no more"):
                save_lora(new, tmp_path)
        else:
            save_lora(new, tmp_path)
    if call in (1, 5):
        expected = old if call == 1 else new
        assert_same_numbers(load_and_run(base, tmp_path, x), expected(x))
    else:
        with pytest.raises(AdapterFileError, match="expected the adapter's config; found no such file"):
            load_lora(copy.deepcopy(base), tmp_path)
    save_lora(new, tmp_path)
    assert_same_numbers(load_and_run(base, tmp_path, x), new(x))


def test_saving_replaces_links_and_does_not_follow_them(tmp_path, base):
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    target.mkdir(), elsewhere.mkdir()
    for name in (CONFIG, WEIGHTS):
        (elsewhere / name).write_text("precious")
        (target / name).symlink_to(elsewhere / name)
    save_lora(trained(base), target)
    assert [path.read_text() for path in elsewhere.iterdir()] == ["precious"] * 2
    assert not (target / CONFIG).is_symlink()
    # A cache of downloads is made of links: they are read through.
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in (CONFIG, WEIGHTS):
        (linked / name).symlink_to(target / name)
    load_lora(copy.deepcopy(base), linked)


def test_a_model_without_data_is_not_loaded_into(tmp_path, base):
    save_lora(trained(base), tmp_path)
    empty = copy.deepcopy(base).to("meta")
    before = state_of(empty)
    with pytest.raises(DeviceError, match=r"^weight of 'layers.0.up' must hold data before an adapter is loaded"):
        load_lora(empty, tmp_path)
    assert state_of(empty) == before
