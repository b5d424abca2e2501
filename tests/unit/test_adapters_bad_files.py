"""Files that `load_lora` must refuse: by file, key, expected and found, with the model as it was."""

import copy
import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_kernels import AdapterFileError, ArgumentError, UnsupportedError, add_lora, load_lora, merge_lora, save_lora
from tests.adapter_models import Stack, state_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = "base_model.model.layers.0.up.lora_{}.weight"


@pytest.fixture
def files(tmp_path) -> Path:
    """A good adapter, on which a test then lays hands."""
    torch.manual_seed(0)
    model = Stack()
    add_lora(model, r=3, target_modules=["up"], init_lora_weights=False)
    save_lora(model, tmp_path)
    return tmp_path


def fresh() -> nn.Module:
    return Stack()


def with_the_adapter() -> nn.Module:
    model = Stack()
    add_lora(model, r=3, target_modules=["up"])
    return model


def with_another_merged() -> nn.Module:
    model = Stack()
    add_lora(model, r=2, target_modules=["head"], adapter_name="other", init_lora_weights=False)
    merge_lora(model)
    return model


MODELS = (fresh, with_the_adapter, with_another_merged)


def refused(files: Path, message: str, models=MODELS, error=AdapterFileError) -> None:
    """The load is refused with this message, and no model has changed, whatever it had."""
    for make in models:
        model = make()
        before = state_of(model)
        with pytest.raises(error, match=message):
            load_lora(model, files)
        assert state_of(model) == before


def change_config(files: Path, **changes) -> None:
    config = json.loads((files / CONFIG).read_text())
    (files / CONFIG).write_text(json.dumps({**config, **changes}))


def change_weights(files: Path, change) -> None:
    tensors = load_file(files / WEIGHTS)
    change(tensors)
    save_file(tensors, files / WEIGHTS, metadata={"format": "pt"})


def test_the_good_one_is_loaded_by_all(files):
    for make in MODELS:
        load_lora(make(), files)


def test_missing_files(files):
    refused(
        files / "no", r"/no: expected a directory with adapter_config.json and adapter_model.safetensors; found none"
    )
    refused(files / CONFIG, r"adapter_config.json: expected a directory")
    (files / WEIGHTS).rename(files / "aside")
    refused(files, r"adapter_model.safetensors: expected the adapter's weights; found no such file")
    (files / "adapter_model.bin").write_bytes(b"")
    refused(
        files, r"expected safetensors; found adapter_model.bin, a pickle, which runs code when it is loaded\. If you"
    )
    (files / CONFIG).unlink()
    refused(files, r"adapter_config.json: expected the adapter's config; found no such file")


def test_special_files_are_not_waited_for(files):
    (files / CONFIG).unlink()
    os.mkfifo(files / CONFIG)
    refused(files, r"expected the adapter's config; found no such file")


@pytest.mark.parametrize("protocol", [None, 0, 2, 4, "zip"])
def test_a_pickle_under_the_name_of_safetensors(files, protocol, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    if protocol == "zip":
        torch.save({"a": Bomb()}, files / WEIGHTS)
    elif protocol is None:
        torch.save({"a": Bomb()}, files / WEIGHTS, _use_new_zipfile_serialization=False)
    else:
        (files / WEIGHTS).write_bytes(pickle.dumps({"a": Bomb()}, protocol=protocol))
    # A pickle of protocol 0 is plain text: no more than "not safetensors" can be said of it.
    expected = "a complete safetensors file" if protocol == 0 else "safetensors; found a pickle, which runs code"
    refused(files, rf"adapter_model.safetensors: expected {expected}")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("start", [0x0280, 0x0480])
def test_a_header_whose_length_looks_like_a_pickle(files, start):
    """The first eight bytes of safetensors are a length, which may well be 80 02."""
    raw = (files / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    (files / WEIGHTS).write_bytes(
        struct.pack("<Q", start) + raw[8 : 8 + length] + b" " * (start - length) + raw[8 + length :]
    )
    load_lora(fresh(), files)


def test_truncated_at_every_length(files):
    whole = (files / WEIGHTS).read_bytes()
    for length in [*range(40), len(whole) // 2, len(whole) - 1]:
        (files / WEIGHTS).write_bytes(whole[:length])
        refused(files, r"adapter_model.safetensors: expected a complete safetensors file; found [\d,]+ bytes", (fresh,))
    (files / WEIGHTS).write_bytes(whole + b"\0")
    refused(files, "expected a complete safetensors file")


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 400]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}',
        b'{"a": {"dtype": "X32", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [18446744073709551615, 2], "data_offsets": [0, 4]}}',
        b"\xff\xfe",
    ],
    ids=range(9),
)
def test_headers_that_lie(files, header):
    (files / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    refused(files, "adapter_model.safetensors: expected a complete safetensors file")


def test_a_header_that_claims_to_be_huge(files):
    (files / WEIGHTS).write_bytes(struct.pack("<Q", 2**62) + b"{}")
    refused(files, "adapter_model.safetensors: expected a complete safetensors file")


@pytest.mark.parametrize(
    ("part", "shape", "message"),
    [
        ("A", (4, 12), r"'{A}' must be \[3, 12\], from r = 3 in adapter_config.json .* found \[4, 12\]"),
        ("A", (3, 13), r"'{A}' must be \[3, 12\], .* found \[3, 13\]"),
        ("A", (3,), r"'{A}' must be \[3, 12\], .* found \[3\]"),
        ("A", (3, 12, 1), r"'{A}' must be \[3, 12\], .* found \[3, 12, 1\]"),
        ("A", (0, 12), r"'{A}' must be \[3, 12\], .* found \[0, 12\]"),
        ("B", (3, 12), r"'{B}' must be \[12, 3\], .* found \[3, 12\]"),
        ("B", (12, 1), r"'{B}' must be \[12, 3\], .* found \[12, 1\]"),
    ],
)
def test_wrong_shapes(files, part, shape, message):
    change_weights(files, lambda tensors: tensors.update({KEY.format(part): torch.zeros(shape)}))
    refused(files, message.format(A=KEY.format("A"), B=KEY.format("B")))


def test_a_rank_that_is_not_the_layers(files):
    def shorten(tensors):
        for key in tensors:
            tensors[key] = tensors[key][:2] if "lora_A" in key else tensors[key][:, :2].contiguous()

    change_weights(files, shorten)
    change_config(files, r=2)
    refused(
        files,
        r"'base_model.model.layers.0.up.lora_A.weight' must be \[3, 12\], since the model's adapter 'default' has "
        r"rank 3 there; found rank 2. Load it under another",
        (with_the_adapter,),
    )
    model = with_the_adapter()
    load_lora(model, files, adapter_name="second")
    assert model.layers[0].up.r == 2


@pytest.mark.parametrize(
    ("remove", "add", "message"),
    [
        ("A", None, r"key '{A}' is missing; expected lora_A and lora_B of every module"),
        ("B", None, r"key '{B}' is missing; expected lora_A and lora_B of every module"),
        ("AB", None, r"key '{A}' is missing; expected lora_A and lora_B of all 2 modules"),
        ("", "base_model.model.head.lora_A.weight", r"key 'base_model.model.head.lora_B.weight' is missing"),
        ("", "base_model.model.layers.0.upp.lora_A.weight", r"none called 'layers.0.upp'\. Near names: 'layers.0.up'"),
        ("", "base_model.model.layers.9.up.lora_A.weight", r"found none called 'layers.9.up'"),
        ("", "layers.0.up.lora_A.weight", r"unknown key 'layers.0.up.lora_A.weight'; expected only base_model.model."),
        ("", "base_model.model.layers.0.up.lora_A.default.weight", "unknown key"),
        ("", "base_model.model.layers.0.up.lora_B.bias", "unknown key"),
        ("", "base_model.model.layers.0.up.lora_magnitude_vector", "unknown key"),
        ("", "base_model.model.embed.lora_embedding_A", "unknown key"),
        ("", "base_model.model.head.weight", "unknown key .* modules saved whole are not supported"),
        ("", "base_model.model..lora_A.weight", "unknown key"),
        ("", "base_model.model.../../../etc/passwd.lora_A.weight", r"found none called '../../../etc/passwd'"),
        ("", "base_model.model.__class__.lora_A.weight", "found none called '__class__'"),
        ("", "base_model.model.layers.0.up.__dict__.lora_A.weight", "found none called"),
        ("", "base_model.model." + "x" * 5000 + ".lora_A.weight", "key 'base_model.model.x{{150,}}…' must belong"),
        ("", "", "unknown key ''"),
    ],
)  # fmt: skip
def test_missing_and_unknown_keys(files, remove, add, message):
    def change(tensors):
        for part in remove:
            del tensors[KEY.format(part)]
        if add is not None:
            tensors[add] = torch.zeros(3, 12)

    change_weights(files, change)
    refused(files, message.format(A=KEY.format("A"), B=KEY.format("B")))


def test_no_keys_at_all(files):
    change_weights(files, dict.clear)
    refused(files, r"expected lora_A and lora_B of at least one module; found no keys")
    change_config(files, target_modules=None)
    refused(files, r"expected lora_A and lora_B of at least one module; found no keys")


def test_a_whole_module_too_many(files):
    def change(tensors):
        tensors["base_model.model.head.lora_A.weight"] = torch.zeros(3, 12)
        tensors["base_model.model.head.lora_B.weight"] = torch.zeros(9, 3)

    change_weights(files, change)
    many = r"unknown key 'base_model.model.head.lora_A.weight'; expected only the 2 modules that "
    refused(files, many + "adapter_config.json chooses; found 3", (fresh, with_another_merged))
    refused(files, many + "the model's adapter 'default' has; found 3", (with_the_adapter,))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf(files, value):
    change_weights(files, lambda tensors: tensors[KEY.format("B")][3].fill_(value))
    refused(files, r"'base_model.model.layers.0.up.lora_B.weight' must be finite; found 3 of 36 elements NaN or Inf")


def test_numbers_too_large_for_the_layer(files):
    change_weights(files, lambda tensors: tensors[KEY.format("B")][0].fill_(1e6))
    refused(
        files,
        r"lora_B.weight' must be finite once converted to torch.float16; found 3 of 36",
        (lambda: with_the_adapter().half(),),
    )
    load_lora(fresh().half(), files)  # as fp32 beside the 16-bit weight


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64, torch.bool], ids=str)
def test_dtypes_that_are_no_weights(files, dtype):
    change_weights(files, lambda tensors: tensors.update({KEY.format("A"): torch.zeros(3, 12).to(dtype)}))
    refused(files, r"'base_model.model.layers.0.up.lora_A.weight' must be one of F64, F32, F16, BF16; found ")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b'{"peft_type": "LORA"',
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"peft_type": "LORA"} {}',
    ],
    ids=range(6),
)
def test_configs_that_are_no_json(files, text):
    (files / CONFIG).write_bytes(text)
    refused(files, r"adapter_config.json: expected JSON in UTF-8; found ")


@pytest.mark.parametrize("text", ["[]", "null", '"LORA"', "3"])
def test_configs_that_are_no_object(files, text):
    (files / CONFIG).write_text(text)
    refused(files, r"adapter_config.json: expected a JSON object; found ")


def test_a_config_of_many_megabytes(files):
    with (files / CONFIG).open("r+b") as file:
        file.truncate(2**24 + 1)
    refused(files, r"adapter_config.json: expected a config of at most 16,777,216 bytes; found 16,777,217")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, r"'peft_type' must be 'LORA'; found \"IA3\""),
        ({"peft_type": None}, r"'peft_type' must be 'LORA'; found null"),
        ({"r": 0}, r"r must be an int from 1 to 512; got 0"),
        ({"r": 513}, r"r must be an int"),
        ({"r": "8"}, r"r must be an int"),
        ({"r": 3.0}, r"r must be an int"),
        ({"r": True}, r"r must be an int"),
        ({"lora_alpha": "8"}, r"lora_alpha must be a finite number"),
        ({"lora_alpha": float("nan")}, r"lora_alpha must be a finite number"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be a number in \[0, 1\)"),
        ({"lora_dropout": None}, r"lora_dropout must be a number"),
        ({"use_rslora": 1}, r"'use_rslora' must be true or false; found 1"),
        ({"bias": "all"}, r"'bias' must be 'none'; found \"all\"\. Trained biases"),
        ({"use_dora": True}, r"'use_dora' must be off; found true\. This feature is not supported"),
        ({"lora_bias": True}, "'lora_bias' must be off"),
        ({"modules_to_save": ["head"]}, "'modules_to_save' must be off"),
        ({"alora_invocation_tokens": [1, 2]}, "'alora_invocation_tokens' must be off"),
        ({"target_parameters": ["w"]}, "'target_parameters' must be off"),
        ({"trainable_token_indices": {"embed": [1]}}, "'trainable_token_indices' must be off"),
        ({"layer_replication": [[0, 2]]}, "'layer_replication' must be off"),
        ({"megatron_config": {"a": 1}}, "'megatron_config' must be off"),
        ({"use_qalora": True}, "'use_qalora' must be off"),
        ({"kasa_config": {"a": 1}}, "'kasa_config' must be off"),
        ({"use_dora": 1}, "'use_dora' must be off"),
        ({"modules_to_save": "head"}, "'modules_to_save' must be off"),
        ({"use_next_years_lora": True}, "'use_next_years_lora' must be off"),
        ({"next_years_config": {"a": 1}}, "'next_years_config' must be off"),
        (
            {"init_lora_weights": "pissa"},
            r"'init_lora_weights' must be .*; found \"pissa\"\. This initialisation changes",
        ),
        ({"init_lora_weights": "pissa_niter_16"}, "'init_lora_weights' must be"),
        ({"init_lora_weights": "olora"}, "'init_lora_weights' must be"),
        ({"init_lora_weights": "corda"}, "'init_lora_weights' must be"),
        ({"init_lora_weights": "loftq"}, "'init_lora_weights' must be"),
        ({"init_lora_weights": {"a": 1}}, "'init_lora_weights' must be"),
        ({"rank_pattern": {"up": 5}}, r"must be \[5, 12\], from r = 5"),
        ({"rank_pattern": {"(": 5}}, r"rank_pattern\['\('\] must be a regular expression"),
        ({"rank_pattern": {"up": "5"}}, r"rank_pattern\['up'\] must be an int"),
        ({"rank_pattern": [5]}, r"'rank_pattern' must be an object of pattern to number; found \[5\]"),
        ({"alpha_pattern": {"up": None}}, r"alpha_pattern\['up'\] must be a finite number"),
        ({"target_modules": "("}, "target_modules must be a regular expression"),
        ({"target_modules": 3}, "target_modules must be a string or a list"),
        ({"target_modules": [3]}, "target_modules must be a string or a list"),
        ({"target_modules": []}, "target_modules must name at least one"),
        ({"exclude_modules": 3}, "exclude_modules must be a string or a list"),
        ({"layers_to_transform": "1"}, "'layers_to_transform' must be a number or a list of numbers"),
        ({"layers_pattern": 1}, "'layers_pattern' must be a string or a list of strings"),
        ({"layers_pattern": ["("]}, "layers_pattern must be a regular expression"),
        ({"layers_pattern": [1]}, "layers_pattern must be a regular expression"),
    ],
    ids=str,
)
def test_bad_configs(files, changes, message):
    change_config(files, **changes)
    if "rank_pattern" not in changes or changes["rank_pattern"] != {"up": 5}:
        message = rf"adapter_config.json: {message}"
    refused(files, message)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["down"]},
        {"target_modules": ["up", "head"]},
        {"target_modules": r"layers\.0\.up"},
        {"exclude_modules": ["layers.0.up"]},
    ],
    ids=str,
)
def test_a_config_that_chooses_other_modules_than_the_keys(files, changes):
    change_config(files, **changes)
    refused(
        files, r"adapter_model.safetensors: (unknown )?key .* adapter_config.json chooses", (fresh, with_another_merged)
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"modules_to_save": None, "use_dora": False, "megatron_config": {}, "target_parameters": []},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"eva_config": {"rho": 2.0}, "init_lora_weights": "eva"},
        {"auto_mapping": {"base_model_class": "Stack"}, "revision": "main", "peft_version": "0.21.2"},
        {"next_years_size": 16, "next_years_name": "x", "use_next_years_lora": False, "next_years_list": []},
        {"fan_in_fan_out": True},
        {"rank_pattern": None, "alpha_pattern": None},
    ],
    ids=str,
)
def test_what_a_config_may_say(files, changes):
    change_config(files, **changes)
    for make in MODELS:
        load_lora(make(), files)


def test_keys_for_what_is_no_linear(files):
    class Other(Stack):
        def __init__(self):
            super().__init__()
            for layer in self.layers:
                layer.up = nn.Sequential(nn.Linear(12, 12))

    refused(
        files,
        r"target_modules must match linears .* it matches 'layers.0.up' \(Sequential\)",
        (Other,),
        UnsupportedError,
    )


def test_bad_names_for_an_adapter(files):
    model = fresh()
    before = state_of(model)
    for name in ("", "a.b", None, 3):
        with pytest.raises(ArgumentError, match=r"^adapter_name must be a non-empty string without dots"):
            load_lora(model, files, adapter_name=name)
    with pytest.raises(ArgumentError, match=r"^backend must be one of"):
        load_lora(model, files, backend="cuda")
    assert state_of(model) == before


def test_an_error_while_the_adapter_is_put_in_place_is_undone(files, monkeypatch):
    """Memory may end at any allocation, also in the last one."""
    for make in MODELS:
        model = make()
        before, tensors = state_of(model), copy.deepcopy(model.state_dict())
        calls = []

        def run_out(*_, calls=calls, **__):
            calls.append(1)
            raise torch.OutOfMemoryError("no memory")

        with monkeypatch.context() as patch:
            patch.setattr(nn.Parameter, "__new__", run_out)
            if make is with_the_adapter:
                patch.setattr("lora_kernels.adapters.weights.WeightsFile.read", run_out)
            with pytest.raises(torch.OutOfMemoryError):
                load_lora(model, files)
        assert calls
        assert state_of(model) == before
        assert all(torch.equal(value, tensors[key]) for key, value in model.state_dict().items())
