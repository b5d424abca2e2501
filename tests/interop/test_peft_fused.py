"""What patch_peft fuses: y and every gradient beside stock PEFT's, both held against PEFT in fp64."""

import pytest
import torch
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch.utils.checkpoint import checkpoint

from lora_kernels import patch_peft
from lora_kernels.interop import _peft_layers
from tests.equality import assert_same_numbers, differ
from tests.interop.peft_cases import (
    K,
    R,
    adapted,
    assert_within_budget,
    inputs,
    layers_of,
    patched_twin,
    run,
)  # fmt: skip

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = {  # the base's and x's dtype, and whether PEFT makes its adapters fp32
    "fp32": (FP32, True),
    "bf16 base, fp32 adapters": (BF16, True),
    "fp16 base, fp32 adapters": (FP16, True),
    "bf16": (BF16, False),
    "fp16": (FP16, False),
    "fp64": (FP64, True),
}
each_dtype = pytest.mark.parametrize(("dtype", "wide"), DTYPES.values(), ids=DTYPES)


def named(model, suffix):
    return [parameter for name, parameter in model.named_parameters() if name.endswith(suffix)]


@each_dtype
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_dtypes_dropout_and_bases(dtype, wide, p, kind):
    model = adapted(dtype, kind=kind, lora_dropout=p, autocast_adapter_dtype=wide)
    assert layers_of(model)[0].lora_A["default"].weight.dtype == (FP32 if wide and dtype in (BF16, FP16) else dtype)
    assert_within_budget(model, inputs(dtype))


@each_dtype
@pytest.mark.parametrize("bias", [True, False], ids=["base bias", "no base bias"])
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")  # PEFT's: it could not be merged without a base bias
def test_lora_bias(dtype, wide, bias):
    model = adapted(dtype, bias=bias, lora_bias=True, autocast_adapter_dtype=wide)
    assert len(named(model, "lora_B.default.bias")) == 2
    assert_within_budget(model, inputs(dtype))


@each_dtype
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("trained", ["base_layer.weight", "base_layer.bias"])
def test_base_parameters_that_train(dtype, wide, kind, trained):
    model = adapted(dtype, kind=kind, lora_dropout=0.1, autocast_adapter_dtype=wide)
    for parameter in named(model, trained):
        parameter.requires_grad_(True)
    assert_within_budget(model, inputs(dtype))


def test_base_bias_and_lora_bias_that_both_train():
    model = adapted(BF16, lora_bias=True)
    for parameter in named(model, "base_layer.bias"):
        parameter.requires_grad_(True)
    assert_within_budget(model, inputs(BF16))


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("frozen", ["lora_A.default.weight", "lora_B.default.weight"])
def test_either_factor_frozen(dtype, frozen):
    model = adapted(dtype, lora_dropout=0.1)
    for parameter in named(model, frozen):
        parameter.requires_grad_(False)
    assert_within_budget(model, inputs(dtype))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_evaluation_mode_drops_nothing(dtype):
    model = adapted(dtype, lora_dropout=0.5).eval()
    assert_within_budget(model, inputs(dtype))


def test_no_base_bias():
    assert_within_budget(adapted(BF16, bias=False), inputs(BF16))


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"rank_pattern": {"up": 3}, "alpha_pattern": {"down": 5}},
        {"r": 1},
        {"bias": "all"},
        {"bias": "lora_only"},
    ],
    ids=str,
)
def test_configurations(config):
    assert_within_budget(adapted(BF16, **config), inputs(BF16))


@pytest.mark.parametrize("leading", [(), (1, 1), (2, 3, 40), (0, 5)], ids=str)
def test_shapes_of_x(leading):
    x = torch.randn(*leading, K, dtype=FP64, generator=torch.Generator().manual_seed(3))
    assert_within_budget(adapted(FP64), x)


def test_x_of_any_strides():
    model = adapted(FP32, lora_dropout=0.1)
    assert_within_budget(model, inputs(FP32, 33, 4).transpose(0, 1))


@pytest.mark.parametrize("x_dtype", [FP32, BF16])
@pytest.mark.parametrize("base_dtype", [FP32, BF16])
@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_autocast(x_dtype, base_dtype, lora_bias, kind):
    model = adapted(base_dtype, kind=kind, lora_dropout=0.1, lora_bias=lora_bias)
    assert_within_budget(model, inputs(x_dtype), autocast=BF16)


def test_autocast_with_bf16_adapters_over_an_fp32_base():
    model = adapted(FP32)
    for layer in layers_of(model):
        layer.lora_A.bfloat16(), layer.lora_B.bfloat16()
    assert_within_budget(model, inputs(FP32), autocast=BF16)


@pytest.mark.parametrize("autocast", [None, BF16])
def test_input_casting_switched_off(autocast):
    """Without PEFT's cast of x to fp32, fp32 adapters over bf16 work under autocast alone, in stock as in ours."""
    model = adapted(BF16)
    for layer in layers_of(model):
        layer.cast_input_dtype_enabled = False
    if autocast:
        assert_within_budget(model, inputs(BF16), autocast=BF16)
    else:
        for twin in (model, patched_twin(model)):
            with pytest.raises(RuntimeError, match="same dtype"):
                twin(inputs(BF16))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_scaling_in_a_tensor(dtype):
    model = adapted(dtype, lora_bias=True)
    prepare_model_for_compiled_hotswap(model, target_rank=R + 3)
    assert isinstance(layers_of(model)[0].scaling["default"], torch.Tensor)
    assert_within_budget(model, inputs(dtype))


def test_scaling_is_read_at_each_call():
    model = adapted(FP32)
    patch_peft(model)
    x = inputs(FP32)
    before = model(x)
    for layer in layers_of(model):
        layer.set_scale("default", 3.0)
    assert_within_budget(model, x)
    assert not torch.allclose(model(x), before)
    for layer in layers_of(model):
        layer.unscale_layer()
    assert_same_numbers(model(x), before)


def test_masks_follow_torchs_generator():
    model = adapted(FP32, lora_dropout=0.5)
    patch_peft(model)
    x = inputs(FP32)
    first, again, other = run(model, x, seed=1), run(model, x, seed=1), run(model, x, seed=2)
    assert_same_numbers(first, again)
    assert differ(first["y"], other["y"])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_replays_the_mask(reentrant):
    model = adapted(BF16, lora_dropout=0.3)
    patch_peft(model)
    x = inputs(BF16)
    replayed = run(lambda_module(model, lambda x: checkpoint(model, x, use_reentrant=reentrant)), x)
    expected = run(model, x)
    assert_same_numbers(replayed, expected)


def lambda_module(model, forward):
    """A module with the model's parameters under their names, and another forward."""

    class Wrapped(torch.nn.Module):
        def named_parameters(self, *args, **kwargs):
            return model.named_parameters(*args, **kwargs)

        def zero_grad(self, set_to_none=True):
            model.zero_grad(set_to_none)

        def forward(self, x):
            return forward(x)

    return Wrapped()


def test_no_gradient_mode():
    model = adapted(BF16, lora_dropout=0.1)
    patched = patched_twin(model)
    x = inputs(BF16)
    torch.manual_seed(0)
    with_grad = patched(x).detach()
    for guard in (torch.no_grad, torch.inference_mode):
        torch.manual_seed(0)
        with guard():
            assert_same_numbers(patched(x), with_grad)


def test_gradients_through_functional_call():
    model = adapted(FP32)
    patched, x = patched_twin(model), inputs(FP32)
    parameters = {name: p.detach() for name, p in patched.named_parameters() if p.requires_grad}

    def loss(parameters):
        return torch.func.functional_call(patched, parameters, (x,)).square().mean()

    gradients = torch.func.grad(loss)(parameters)
    patched(x).square().mean().backward()
    for name, parameter in patched.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad)


lora_linear = _peft_layers.lora_linear
FAULTS = {
    "scaling off by 1%": lambda *a, scaling, **kw: lora_linear(*a, scaling=1.01 * scaling, **kw),
    "no dropout": lambda *a, dropout_p, **kw: lora_linear(*a, dropout_p=0.0, **kw),
    "no gradient of A": lambda x, w, a, *rest, **kw: lora_linear(x, w, a.detach() + 0 * a, *rest, **kw),
    "no bias": lambda x, w, a, b, bias, **kw: lora_linear(x, w, a, b, None, **kw),
    "x in 8 bits": lambda x, *rest, **kw: lora_linear(x + (x.to(torch.float8_e4m3fn).to(x) - x).detach(), *rest, **kw),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_the_budget_sees_a_wrong_result(fault, monkeypatch):
    model, x = adapted(BF16, lora_dropout=0.1), inputs(BF16)
    assert_within_budget(model, x)
    monkeypatch.setattr(_peft_layers, "lora_linear", fault)
    with pytest.raises(AssertionError, match=r"\d > \d"):
        assert_within_budget(model, x)
