"""Where patch_peft leaves a call to PEFT: the reason by name, and stock PEFT's result to the bit."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import nn

from lora_kernels import patch_peft
from lora_kernels.interop import _peft_layers
from tests.equality import assert_same_numbers
from tests.interop.peft_cases import K, adapted, fused_calls, inputs, layers_of, patched_twin, run

is_small = _peft_layers.is_small  # as it is outside these tests


class Tagged(torch.Tensor):
    """Any tensor subclass: torchao's, DTensor."""


def disable(model):
    model.base_model.disable_adapter_layers()


def merge(model):
    model.merge_adapter()


def activate_two(model):
    torch.manual_seed(5)
    model.add_adapter("second", LoraConfig(r=3, target_modules=["up", "down"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])


def activate_none(model):
    for layer in layers_of(model):
        layer._active_adapter = ["elsewhere"]


def hook_lora_A(model):
    for layer in layers_of(model):
        layer.lora_A["default"].register_forward_hook(lambda module, args, output: 2 * output)


def hook_lora_B_before(model):
    for layer in layers_of(model):
        layer.lora_B["default"].register_forward_pre_hook(lambda module, args: (2 * args[0],))


def hook_lora_B_backward(model):
    for layer in layers_of(model):
        layer.lora_B["default"].register_full_backward_hook(lambda module, gx, gy: (2 * gx[0],))


def hook_dropout(model):
    for layer in layers_of(model):
        layer.lora_dropout["default"].register_forward_hook(lambda module, args, output: 2 * output)


def own_forward_of_lora_A(model):
    for layer in layers_of(model):
        linear = layer.lora_A["default"]
        linear.forward = lambda x, linear=linear: 2 * nn.functional.linear(x, linear.weight)


def own_class_of_lora_A(model):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for layer in layers_of(model):
        layer.lora_A["default"].__class__ = Doubled


def bias_of_lora_A(model):
    for layer in layers_of(model):
        layer.lora_A["default"].bias = nn.Parameter(torch.ones(8))


def own_dropout(model):
    for layer in layers_of(model):
        layer.lora_dropout["default"] = nn.AlphaDropout(0.1)


def dropout_of_everything(model):
    for layer in layers_of(model):
        layer.lora_dropout["default"] = nn.Dropout(1.0)


def dropout_in_place(model):
    for layer in layers_of(model):
        layer.lora_dropout["default"] = nn.Dropout(0.1, inplace=True).eval()  # in training, autograd refuses


def subclass_in_lora_A(model):
    for layer in layers_of(model):
        linear = layer.lora_A["default"]
        linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Tagged))


def scaling_of_each_row(model):
    for layer in layers_of(model):
        layer.scaling["default"] = torch.full((layer.out_features,), 0.5)


def scaling_of_integers(model):
    for layer in layers_of(model):
        layer.scaling["default"] = torch.tensor(2)


def scaling_of_numpy(model):
    for layer in layers_of(model):
        layer.scaling["default"] = np.float32(0.5)


def bf16_adapters(model):
    for layer in layers_of(model):
        layer.lora_A.bfloat16(), layer.lora_B.bfloat16()


SITUATIONS = {
    "disabled": (disable, "adapters are disabled"),
    "merged": (merge, "the adapter is merged"),
    "two active": (activate_two, "2 adapters are active"),
    "none active": (activate_none, "no adapters are active"),
    "forward hook on A": (hook_lora_A, "lora_A has hooks"),
    "forward pre-hook on B": (hook_lora_B_before, "lora_B has hooks"),
    "backward hook on B": (hook_lora_B_backward, "lora_B has hooks"),
    "hook on dropout": (hook_dropout, "its dropout has hooks"),
    "own forward on A": (own_forward_of_lora_A, "lora_A has a forward of its own"),
    "own class of A": (own_class_of_lora_A, "lora_A is a Doubled"),
    "bias of A": (bias_of_lora_A, "lora_A has a bias"),
    "own dropout": (own_dropout, "its dropout is a AlphaDropout"),
    "p = 1": (dropout_of_everything, "its dropout works in place or drops everything"),
    "dropout in place": (dropout_in_place, "its dropout works in place or drops everything"),
    "tensor subclass in A": (subclass_in_lora_A, "lora_A holds a Tagged"),
    "scaling per row": (scaling_of_each_row, "its scaling is a tensor that is not one floating-point number"),
    "scaling of integers": (scaling_of_integers, "its scaling is a tensor that is not one floating-point number"),
    "scaling of numpy": (scaling_of_numpy, "its scaling is not a finite number"),
    "16-bit adapter, fp32 base": (bf16_adapters, "x is float32, the adapter bfloat16"),
}
situations = pytest.mark.parametrize(("change", "reason"), SITUATIONS.values(), ids=SITUATIONS)


def assert_left_to_peft(patched, stock, x):
    with fused_calls() as calls:
        actual = run(patched, x)
    assert calls.operations == []
    expected = run(stock, x)
    assert set(actual) == set(expected)
    assert_same_numbers(actual, expected)


@situations
def test_reported(change, reason):
    model = adapted(torch.float32, lora_dropout=0.1)
    change(model)
    report = patch_peft(model)
    assert [(row.operation, reason in row.reason) for row in report.rows] == [(None, True)] * 2, report


@situations
def test_handled_at_the_call(change, reason):
    """The model is patched first and gets into the situation afterwards."""
    model = adapted(torch.float32, lora_dropout=0.1)
    patched = patched_twin(model)
    with fused_calls() as calls:
        run(patched, inputs(torch.float32))
    assert calls.operations == ["lora_linear"] * 2
    change(patched)
    change(model)
    assert_left_to_peft(patched, model, inputs(torch.float32))


def test_back_to_fused_when_the_situation_passes():
    model = adapted(torch.float32)
    patch_peft(model)
    x = inputs(torch.float32)
    for enter, leave in (
        (disable, lambda model: model.base_model.enable_adapter_layers()),
        (merge, lambda model: model.unmerge_adapter()),
    ):
        enter(model)
        with fused_calls() as calls:
            model(x)
        assert calls.operations == []
        leave(model)
        with fused_calls() as calls:
            model(x)
        assert calls.operations == ["lora_linear"] * 2


VARIANTS = {
    "DoRA": ({"use_dora": True}, "DoraLinearVariant"),
    "aLoRA": ({"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}, "ALoraLinearVariant"),
}


@pytest.mark.parametrize(("config", "variant"), VARIANTS.values(), ids=VARIANTS)
def test_variants(config, variant):
    model = nn.Sequential(nn.Linear(K, 24))
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, **config)
    layer = lora.Linear(model[0], "default", config, r=4, lora_alpha=8).train()
    patched = copy.deepcopy(layer)
    assert [row.reason for row in patch_peft(patched).rows] == [f"the adapter is a {variant}"]
    assert_left_to_peft(patched, layer, inputs(torch.float32))


def test_rank_beyond_the_largest():
    model = adapted(torch.float32, r=513)
    patched = patched_twin(model)
    assert {row.reason for row in patch_peft(patched).rows} == {"its rank is above 512"}
    assert_left_to_peft(patched, model, inputs(torch.float32))


def test_arguments_besides_x():
    model = adapted(torch.float32, lora_dropout=0.1).eval()
    patched, x = patched_twin(model), inputs(torch.float32)
    names = ["default", "__base__", "default", "__base__"]
    with fused_calls() as calls:
        assert_same_numbers(patched(x, adapter_names=names), model(x, adapter_names=names))
        for layer, stock in zip(layers_of(patched), layers_of(model), strict=True):
            x = inputs(torch.float32, features=layer.in_features)
            assert_same_numbers(layer(x, alora_offsets=None), stock(x, alora_offsets=None))
    assert calls.operations == []
    model.train(), patched.train()
    with pytest.raises(ValueError, match="in training mode"):
        patched(x, adapter_names=names)


def test_global_hooks_see_the_modules_that_peft_calls():
    model = adapted(torch.float32)
    patched = patched_twin(model)

    def seen(model):
        classes = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, *_: classes.append(type(module).__name__)
        )
        try:
            run(model, inputs(torch.float32))
            if model is patched:
                assert {row.reason for row in patch_peft(patched).rows} == {"torch has global module hooks"}
        finally:
            handle.remove()
        return classes

    assert seen(patched) == seen(model)


@pytest.mark.parametrize("x", [torch.ones(2, K, dtype=torch.float64), torch.ones(2, K, dtype=torch.int64)], ids=str)
def test_inputs_that_peft_refuses(x):
    model = adapted(torch.float32)
    for twin in (model, patched_twin(model)):
        with pytest.raises(RuntimeError, match="dtype"):
            twin(x)


def adapter_in(layer_dtypes):
    """PEFT computes these under autocast, each in its own way."""
    model = adapted(torch.float32, kind="conv1d")
    for layer in layers_of(model):
        layer.lora_A.to(layer_dtypes[0]), layer.lora_B.to(layer_dtypes[1])
    return model


@pytest.mark.parametrize(
    ("dtypes", "reason"),
    [
        ((torch.float64, torch.float64), "autocast leaves one of float32 x and float64 adapter as it is"),
        ((torch.float32, torch.bfloat16), "lora_A and lora_B are of two dtypes"),
    ],
    ids=str,
)
def test_dtypes_under_autocast(dtypes, reason):
    model = adapter_in(dtypes)
    patched = patched_twin(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert {row.reason for row in patch_peft(patched).rows} == {reason}
    with fused_calls() as calls:
        actual = run(patched, inputs(torch.float32), autocast=torch.bfloat16)
    assert calls.operations == []
    assert_same_numbers(actual, run(model, inputs(torch.float32), autocast=torch.bfloat16))


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
def test_complex_layers():
    model = adapted(torch.complex64)
    patched = patched_twin(model)
    assert {row.reason for row in patch_peft(patched).rows} == {"x is complex64"}
    assert_left_to_peft(patched, model, inputs(torch.complex64))


def test_an_x_of_another_tensor_class():
    model = adapted(torch.float32)
    x = inputs(torch.float32).as_subclass(Tagged)
    with fused_calls() as calls:
        y = patched_twin(model)(x)
    assert calls.operations == []
    assert type(y) is Tagged
    assert_same_numbers(y.as_subclass(torch.Tensor), model(x.as_subclass(torch.Tensor)))


def test_meta_tensors():
    model = adapted(torch.float32)
    patched = patched_twin(model).to("meta")
    with fused_calls() as calls:
        y = patched(torch.empty(3, K, device="meta"))
    assert y.is_meta
    assert y.shape == (3, 72)
    assert calls.operations == []


def test_layers_of_other_kinds_are_named():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.conv, self.linear = nn.Embedding(10, 4), nn.Conv1d(4, 4, 1), nn.Linear(4, 4)
            self.attention = nn.MultiheadAttention(4, 2)

    targets = ["embedding", "conv", "linear", "attention"]
    model = get_peft_model(Mixed(), LoraConfig(r=2, target_modules=targets))
    report = patch_peft(model)
    rows = {row.name.removeprefix("base_model.model."): row[1:] for row in report.rows}
    assert rows == {
        "embedding": ("Embedding", None, "lora.Embedding is not a layer that can be fused"),
        "conv": ("Conv1d", None, "lora.Conv1d is not a layer that can be fused"),
        "linear": ("Linear", "lora_linear", ""),
        "attention": ("MultiheadAttention", None, "lora.MultiheadAttention is not a layer that can be fused"),
        "attention.base_layer.out_proj": (
            "Linear", None, "base_model.model.attention merges its weight and does not call it",
        ),
    }  # fmt: skip


def test_a_subclass_of_pefts_layer_is_left_alone():
    class Own(lora.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = adapted(torch.float32)
    for layer in layers_of(model):
        layer.__class__ = Own
    patched = copy.deepcopy(model)
    assert {row.reason for row in patch_peft(patched).rows} == {"lora.Own is not a layer that can be fused"}
    assert_left_to_peft(patched, model, inputs(torch.float32))


def test_a_layer_with_a_forward_of_its_own():
    """X-LoRA and accelerate set the instance's forward, which nn.Module calls instead of ours."""
    model = adapted(torch.float32)
    for layer in layers_of(model):
        layer.forward = lambda x, layer=layer: lora.Linear.forward(layer, x)
    assert {row.reason for row in patch_peft(model).rows} == {"the layer has a forward of its own"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_small_calls(monkeypatch, dtype, p):
    """Just below the limit of its kind a call runs PEFT's forward, at the limit ours; compiled, ours."""
    monkeypatch.setattr(_peft_layers, "is_small", is_small)
    limit = _peft_layers.SMALL_CALL[32 if dtype is torch.float32 else 16, p > 0]
    features = 512
    model = get_peft_model(
        nn.Sequential(nn.Linear(features, features)).to(dtype), LoraConfig(r=1, target_modules=["0"], lora_dropout=p)
    ).train()
    patch_peft(model)
    rows = limit // features**2
    with torch.no_grad(), fused_calls() as calls:
        model(torch.zeros(rows - 1, features, dtype=dtype))
        assert calls.operations == []
        model(torch.zeros(rows, features, dtype=dtype))
        assert calls.operations == ["lora_linear"]
        if p:  # evaluated, it drops nothing
            model.eval()
            model(torch.zeros(rows - 1, features, dtype=dtype))
            assert calls.operations == ["lora_linear"] * 2


def test_small_calls_count_autocast_as_16_bits():
    (layer, _) = layers_of(adapted(torch.float32))
    limit = _peft_layers.SMALL_CALL[16, False]
    x = torch.zeros(limit // layer.out_features // K + 1, K)
    assert is_small(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_small(layer, x)


@situations
def test_the_document_quotes_the_reason(change, reason):
    """docs/interop/peft.md has it in backticks, with an ellipsis for what differs from layer to layer."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "interop" / "peft.md").read_text(encoding="utf-8")
    patterns = [re.escape(quote).replace("…", r"\w+") for quote in re.findall(r"`([^`\n]+)`", text)]
    # What is said of A holds for B.
    assert any(re.fullmatch(pattern, reason.replace("lora_B", "lora_A")) for pattern in patterns)
