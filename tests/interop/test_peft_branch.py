"""Bases that lora_linear cannot compute: their own output with the adapter's term on top, against stock PEFT."""

import copy
import logging

import bitsandbytes
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from peft.tuners.lora.aqlm import AqlmLoraLinear
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.te import TeLinear
from peft.tuners.lora.torchao import TorchaoLoraLinear
from torch import nn

from lora_kernels import patch_peft
from lora_kernels.testing import budget_rows
from tests.equality import assert_same_numbers
from tests.interop.peft_cases import (
    adapted,
    assert_within_budget,
    fused_calls,
    inputs,
    layers_of,
    patched_twin,
    run,
    stock_twin,
)

K, N, M = 128, 96, 64
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def quiet_bitsandbytes(caplog):
    """It announces each cast of an 8-bit layer's input."""
    caplog.set_level(logging.ERROR, logger="bitsandbytes")


class Wide(nn.Module):
    """A base as it is, in its own dtype, for an fp64 layer around it: the truth has the base's own errors."""

    def __init__(self, base, dtype):
        super().__init__()
        self.base, self.dtype = base, dtype

    def forward(self, x):
        return self.base(x.to(self.dtype)).double()


class Int8(nn.Linear):
    """A quantised layer in miniature: 8-bit weights and one scale, multiplied out at each call."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        del self.weight
        scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    @property
    def weight(self):
        return self.qweight

    def forward(self, x):
        return nn.functional.linear(x, self.qweight.to(x.dtype) * self.scale.to(x.dtype))


class Wrapped(torch.Tensor):
    """What torchao does to a weight, without the quantisation: a subclass whose products are plain tensors."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        return out.as_subclass(torch.Tensor) if func is nn.functional.linear else out


def four_bit(dtype, compress=False):
    base = bitsandbytes.nn.Linear4bit(K, N, compute_dtype=dtype, quant_type="nf4", compress_statistics=compress)
    return quantised(base, "is_loaded_in_4bit")


def eight_bit(dtype):
    return quantised(bitsandbytes.nn.Linear8bitLt(K, N, has_fp16_weights=False), "is_loaded_in_8bit")


def quantised(base, flag):
    net = nn.Sequential(base)
    net.load_state_dict(nn.Sequential(nn.Linear(K, N)).state_dict())
    setattr(net, flag, True)
    return net.to("cpu")  # which is when bitsandbytes quantises


def layer_over(base, cls, **config):
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["x"], init_lora_weights=False, **config)
    base.requires_grad_(False)
    return nn.Sequential(cls(base, "default", config, r=8, lora_alpha=16)).train()


def assert_branch_within_budget(model, dtype, *, autocast=None):
    """One layer's y and gradients, with the base's own output and gradient in the truth."""
    x = inputs(dtype, M, features=K)
    with fused_calls() as calls:
        actual = run(patched_twin(model), x, autocast=autocast)
    assert calls.operations == ["lora_branch"]
    eager = run(stock_twin(model), x, autocast=autocast)
    wide = stock_twin(model)
    for layer in layers_of(wide):
        layer.lora_A.double(), layer.lora_B.double()
        for name in ("base_layer", "quant_linear_module"):
            if name in layer._modules:
                layer._modules[name] = Wide(layer._modules[name], autocast or dtype)
    truth = run(wide, x.double())
    assert set(actual) == set(eager) == set(truth)
    failed = [row for row in budget_rows(actual, eager, truth) if not row.ok]
    assert not failed, failed
    assert actual["y"].dtype == eager["y"].dtype


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("config", [{}, {"lora_dropout": 0.1}, {"lora_bias": True}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("base", [four_bit, eight_bit], ids=lambda make: make.__name__)
def test_bitsandbytes(base, dtype, config):
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["0"], init_lora_weights=False, **config)
    model = get_peft_model(base(dtype), config).train()
    (layer,) = layers_of(model)
    assert type(layer).__name__ == {four_bit: "Linear4bit", eight_bit: "Linear8bitLt"}[base]
    assert layer.lora_A["default"].weight.dtype == FP32
    (row,) = patch_peft(copy.deepcopy(model)).rows
    assert row[1:] == (type(layer).__name__, "lora_branch", f"the base layer is a {type(layer).__name__}")
    assert_branch_within_budget(model, dtype)


def test_four_bits_with_double_quantisation_under_autocast():
    torch.manual_seed(0)
    config = LoraConfig(r=8, target_modules=["0"], init_lora_weights=False, lora_dropout=0.1)
    model = get_peft_model(four_bit(BF16, compress=True), config).train()
    assert_branch_within_budget(model, BF16, autocast=BF16)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("cls", [lora.GPTQLoraLinear, AwqLoraLinear, AqlmLoraLinear, TeLinear, lora.Linear])
def test_quantised_layers_of_others(cls, dtype):
    """PEFT's own layer classes over a stand-in for the quantised base, which is all that they call."""
    torch.manual_seed(0)
    model = layer_over(Int8(nn.Linear(K, N).to(dtype)), cls, lora_dropout=0.1)
    (row,) = patch_peft(copy.deepcopy(model)).rows
    assert row[1:] == (cls.__name__, "lora_branch", "the base layer is a Int8")
    assert_branch_within_budget(model, dtype)


@pytest.mark.parametrize("cls", [lora.GPTQLoraLinear, AwqLoraLinear, AqlmLoraLinear, TeLinear])
def test_disabled_layers_of_others(cls):
    torch.manual_seed(0)
    layer = layer_over(Int8(nn.Linear(K, N)), cls)[0]
    patched, x = copy.deepcopy(layer), inputs(FP32, M, features=K)
    patch_peft(patched)
    for twin in (layer, patched):
        twin.enable_adapters(False)
    assert_same_numbers(patched(x), layer(x))
    assert_same_numbers(patched(x), layer.base_layer(x))


@pytest.mark.parametrize("cls", [lora.GPTQLoraLinear, AwqLoraLinear])
def test_the_base_that_pefts_forward_calls(cls):
    """These have it under two names, and forward uses the second."""
    torch.manual_seed(0)
    layer = layer_over(Int8(nn.Linear(K, N)), cls)[0]
    layer.quant_linear_module = Int8(nn.Linear(K, N))
    patched, x = copy.deepcopy(layer), inputs(FP32, M, features=K)
    patch_peft(patched)
    with fused_calls() as calls:
        torch.testing.assert_close(patched(x), layer(x), rtol=1e-4, atol=1e-5)
    assert calls.operations == ["lora_branch"]


def test_a_weight_of_another_tensor_class():
    def made():
        torch.manual_seed(0)
        base = nn.Linear(K, N)
        base.weight = nn.Parameter(base.weight.detach().as_subclass(Wrapped), requires_grad=False)
        model = layer_over(base, lora.Linear)
        model[0].__class__ = TorchaoLoraLinear  # whose constructor imports torchao
        return model

    model, patched, x = made(), made(), inputs(FP32, M, features=K)
    (row,) = patch_peft(patched).rows
    assert row[1:] == ("TorchaoLoraLinear", "lora_branch", "the base layer holds a Wrapped")
    with fused_calls() as calls:
        actual = run(patched, x)
    assert calls.operations == ["lora_branch"]
    for name, value in run(model, x).items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-5)


class Tripled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


def hooked_after(base):
    base.register_forward_hook(lambda module, args, output: 2 * output)


def hooked_before(base):
    base.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def hooked_backward(base):
    base.register_full_backward_hook(lambda module, dx, dy: (2 * dx[0],))


def hooked_before_backward(base):
    base.register_full_backward_pre_hook(lambda module, dy: (2 * dy[0],))


def own_forward(base):
    base.forward = lambda x: 2 * nn.functional.linear(x, base.weight, base.bias)


def own_class(base):
    base.__class__ = Tripled


BASES = {
    "forward hook": (hooked_after, "the base layer has hooks"),
    "forward pre-hook": (hooked_before, "the base layer has hooks"),
    "backward hook": (hooked_backward, "the base layer has hooks"),
    "backward pre-hook": (hooked_before_backward, "the base layer has hooks"),
    "own forward": (own_forward, "the base layer has a forward of its own"),
    "own class": (own_class, "the base layer is a Tripled"),
}


@pytest.mark.parametrize(("change", "reason"), BASES.values(), ids=BASES)
@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_bases_that_do_more_than_their_weight_says(change, reason, dtype, lora_bias):
    """They get into the state after the patch, and each call sees it."""
    torch.manual_seed(0)
    model = layer_over(nn.Linear(K, N).to(dtype), lora.Linear, lora_dropout=0.1, lora_bias=lora_bias)
    if dtype is BF16:
        assert model[0].lora_A["default"].weight.dtype is BF16  # PEFT widens adapters when it injects them
        model[0].lora_A.float(), model[0].lora_B.float()
    patched, stock = patched_twin(model), stock_twin(model)
    x = inputs(dtype, M, features=K)
    with fused_calls() as calls:
        run(patched, x)
        change(patched[0].base_layer)
        actual = run(patched, x)
    assert calls.operations == ["lora_linear", "lora_branch"]
    assert [row.reason for row in patch_peft(patched).rows] == [reason]
    change(stock[0].base_layer)
    eager = run(stock, x)
    wide = stock_twin(model)
    change(wide[0].base_layer)
    wide[0].lora_A.double(), wide[0].lora_B.double()
    wide[0].base_layer = Wide(wide[0].base_layer, dtype)
    truth = run(wide, x.double())
    assert set(actual) == set(eager) == set(truth)
    failed = [row for row in budget_rows(actual, eager, truth) if not row.ok]
    assert not failed, failed


def test_a_trainable_base_that_is_hooked_keeps_its_gradient():
    model = adapted(FP32)
    for layer in layers_of(model):
        layer.base_layer.requires_grad_(True)
        hooked_after(layer.base_layer)
    x = inputs(FP32)
    with fused_calls() as calls:
        actual = run(patched_twin(model), x)
    assert calls.operations == ["lora_branch"] * 2
    expected = run(model, x)
    assert sum("base_layer" in name for name in actual) == 4
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5)


def test_offloaded_base():
    """accelerate keeps the weight on meta between calls and brings it back in the base's own forward."""
    model = adapted(FP32)
    patched = patched_twin(model)
    for layer in layers_of(patched):
        weights = {name: value.clone() for name, value in layer.base_layer.state_dict().items()}
        hook = AlignDevicesHook(execution_device="cpu", offload=True, weights_map=weights)
        add_hook_to_module(layer.base_layer, hook)
        assert layer.base_layer.weight.is_meta
    assert {row.reason for row in patch_peft(patched).rows} == {"the base layer has a forward of its own"}
    x = inputs(FP32)
    with torch.no_grad(), fused_calls() as calls:
        torch.testing.assert_close(patched(x), model(x), rtol=1e-4, atol=1e-5)
    assert calls.operations == ["lora_branch"] * 2


def test_a_base_in_another_dtype_than_x_is_pefts_to_refuse():
    model = adapted(FP32)
    for layer in layers_of(model):
        layer.base_layer.bfloat16()
    patched = patched_twin(model)
    assert {row.operation for row in patch_peft(patched).rows} == {"lora_linear"}  # for x in bf16
    for twin in (model, patched):
        with pytest.raises(RuntimeError, match="dtype"):
            twin(inputs(FP32))


def test_a_base_of_two_dtypes_works_under_autocast():
    model = adapted(FP32)
    for layer in layers_of(model):
        layer.base_layer.bias.data = layer.base_layer.bias.data.bfloat16()
    x = inputs(FP32)
    assert {row.reason for row in patch_peft(copy.deepcopy(model)).rows} == {
        "the base layer is on another device, or of two dtypes"
    }
    assert_within_budget(model, x, autocast=BF16, operations=("lora_branch", "lora_branch"))


def test_weights_outside_the_parameters():
    """FSDP puts views of its flat parameter in place of weight and bias while a unit runs."""
    model = adapted(FP32)
    patched, x = patched_twin(model), inputs(FP32)
    expected = run(patched, x)
    for layer in layers_of(patched):
        for module in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
            for name, parameter in list(module.named_parameters()):
                delattr(module, name)
                setattr(module, name, parameter.view_as(parameter))
    with fused_calls() as calls:
        actual = run(patched, x)
    assert calls.operations == ["lora_linear"] * 2
    assert_same_numbers(actual["y"], expected["y"])
    assert_same_numbers(actual["d_x"], expected["d_x"])


def test_hooked_layers_are_left_to_module_call():
    """Hooks on the LoRA layer itself run around either forward."""
    model = adapted(FP32)
    patched = patched_twin(model)
    for twin in (model, patched):
        for layer in layers_of(twin):
            layer.register_forward_hook(lambda module, args, output: 2 * output)
    x = inputs(FP32)
    with fused_calls() as calls:
        actual = patched(x)
    assert calls.operations == ["lora_linear"] * 2
    torch.testing.assert_close(actual, model(x), rtol=1e-4, atol=1e-5)
