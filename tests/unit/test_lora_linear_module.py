"""`LoRALinear`: a drop-in for torch.nn.Linear: construction, copies, arguments."""

import copy
import io
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_kernels import ArgumentError, DeviceError, DtypeError, LoRALinear, lora_linear
from lora_kernels.testing import budget_rows, make_linear_inputs, run_linear
from tests.equality import assert_same_numbers, differ, in_whole_numbers, whole
from tests.linear_cases import assert_same_bits

K, N, R = 24, 20, 4
STATE = {"weight", "bias", "lora_A", "lora_B"}


def trained(**options) -> LoRALinear:
    """A layer whose update is not zero, as after training."""
    torch.manual_seed(0)
    return LoRALinear(K, N, **{"r": R, "lora_alpha": 8, "init_lora_weights": False, **options})


@pytest.mark.parametrize("init", [True, "gaussian"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_new_layer_equals_its_base(dtype, bias, init):
    layer = LoRALinear(K, N, bias, r=R, init_lora_weights=init, dtype=dtype, lora_dropout=0.5)
    x = torch.randn(3, 5, K, dtype=dtype)
    # Also while training: whatever is dropped, B is zero.
    y, base = layer(x), F.linear(x, layer.weight, layer.bias)
    truth = {"y": F.linear(x.double(), layer.weight.double(), None if not bias else layer.bias.double())}
    assert y.dtype == dtype
    if dtype == torch.float64:
        assert (y - base).abs().max() <= 2 * K * 2**-53 * base.abs().max() * 4
    else:
        assert budget_rows({"y": y}, {"y": base}, truth)[0].ok


def test_from_linear_shares_storage_and_copies_nothing():
    base = nn.Linear(K, N).eval()
    weight, bias = base.weight, base.bias
    layer = LoRALinear.from_linear(base, r=R, lora_alpha=2, lora_dropout=0.25, use_rslora=True)
    assert layer.weight is base.weight is weight
    assert layer.bias is base.bias is bias
    assert not layer.training
    assert (layer.in_features, layer.out_features, layer.r, layer.lora_dropout) == (K, N, R, 0.25)
    assert layer.scaling == 2 / math.sqrt(R)
    assert not weight.requires_grad
    assert not bias.requires_grad
    with torch.no_grad():
        base.weight.mul_(2)
    x = torch.randn(4, K)
    assert torch.allclose(layer(x), base(x), rtol=0, atol=K * 2**-23 * 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_from_linear_takes_over_dtype_device_and_mode(dtype, bias):
    base = nn.Linear(K, N, bias=bias, dtype=dtype)
    layer = LoRALinear.from_linear(base, r=R)
    assert layer.training
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert (layer.bias is None) == (not bias)
    assert LoRALinear.from_linear(nn.Linear(K, N, device="meta"), r=R).lora_A.is_meta


def test_two_layers_may_share_a_weight():
    base = nn.Linear(K, N)
    first, second = (LoRALinear.from_linear(base, r=R, init_lora_weights=False) for _ in range(2))
    before = base.weight.clone()
    tensors = [second.weight, second.lora_A.clone(), second.lora_B.clone()]
    first.merge()
    assert torch.equal(base.weight, before)
    assert second.weight is tensors[0]
    assert torch.equal(second.lora_A, tensors[1])
    assert torch.equal(second.lora_B, tensors[2])


def test_a_refused_from_linear_leaves_the_linear_alone():
    base = nn.Linear(K, N)
    for options in ({"r": 0}, {"adapter_dtype": torch.float16}, {"lora_dropout": 1.0}, {"init_lora_weights": "x"}):
        with pytest.raises((ArgumentError, DtypeError)):
            LoRALinear.from_linear(base, **options)
        assert base.weight.requires_grad
        assert base.bias.requires_grad


@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_keys_and_round_trip(bias):
    layer = trained(bias=bias)
    state = layer.state_dict()
    assert set(state) == STATE - (set() if bias else {"bias"})
    other = LoRALinear(K, N, bias, r=R, lora_alpha=8)
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    assert_same_bits(other.state_dict(), state)
    x = torch.randn(3, K)
    assert_same_numbers(other(x), layer(x))


def test_a_plain_linears_state_loads_where_only_the_adapter_is_missing():
    missing, unexpected = trained().load_state_dict(nn.Linear(K, N).state_dict(), strict=False)
    assert (set(missing), unexpected) == ({"lora_A", "lora_B"}, [])
    with pytest.raises(RuntimeError, match="lora_A"):
        trained().load_state_dict(nn.Linear(K, N).state_dict())


def test_parameters_gradients_and_counts():
    layer = LoRALinear(512, 512, r=8, bias=False)
    trainable = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in layer.parameters() if not p.requires_grad)
    assert (trainable, frozen) == (8192, 262144)
    assert isinstance(layer, nn.Linear)


@pytest.mark.parametrize("how", ["deepcopy", "save"])
@pytest.mark.parametrize("merged", [False, True])
def test_copies(how, merged):
    layer = trained(lora_dropout=0.5, adapter_dtype=torch.float32, dtype=torch.bfloat16, backend="torch")
    if merged:
        layer.merge()
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    else:
        buffer = io.BytesIO()
        torch.save(layer.state_dict(), buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
        other = LoRALinear(K, N, r=R, lora_alpha=8, dtype=torch.bfloat16, adapter_dtype=torch.float32)
        other.load_state_dict(state)
        assert not other.merged
        if merged:
            other.merge()
    layer.eval(), other.eval()
    assert_same_bits(other.state_dict(), layer.state_dict())
    x = torch.randn(3, K, dtype=torch.bfloat16)
    assert_same_numbers(other(x), layer(x))
    with torch.no_grad():
        other.weight.zero_()
    assert layer.weight.any()
    assert other.merged == merged
    other.unmerge()
    assert not other.merged


def test_a_whole_layer_is_pickled():
    layer = trained().eval()
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    other = torch.load(buffer, weights_only=False)
    assert_same_bits(other.state_dict(), layer.state_dict())
    x = torch.randn(3, K)
    assert_same_numbers(other(x), layer(x))
    assert repr(other) == repr(layer)


def test_meta_device_then_materialised():
    with torch.device("meta"):
        layer = LoRALinear(K, N, r=R)
    assert all(p.is_meta for p in layer.parameters())
    with pytest.raises(DeviceError, match=r"must hold data; got a meta tensor.*Materialise"):
        layer(torch.randn(2, K))
    with pytest.raises(DeviceError, match="must hold data to be merged; got a meta tensor"):
        layer.merge()
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert [p.requires_grad for p in layer.parameters()] == [False, False, True, True]
    torch.manual_seed(3)
    layer.reset_parameters()
    torch.manual_seed(3)
    fresh = LoRALinear(K, N, r=R)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), fresh.parameters(), strict=True))


def test_base_is_initialised_as_nn_linear_is():
    torch.manual_seed(5)
    linear = nn.Linear(K, N)
    torch.manual_seed(5)
    layer = LoRALinear(K, N)
    assert torch.equal(layer.weight, linear.weight)
    assert torch.equal(layer.bias, linear.bias)


def test_init_schemes():
    wide, r = 4096, 16
    for init in (True, False, "gaussian"):
        torch.manual_seed(0)
        layer = LoRALinear(wide, 8, r=r, init_lora_weights=init)
        # kaiming_uniform_(a=sqrt(5)): uniform in +-1/sqrt(fan_in); PEFT's default.
        bound = 1 / math.sqrt(wide)
        if init == "gaussian":
            # The standard deviation of a sample of n normals has a standard error of sigma / sqrt(2 n): six of them.
            assert abs(layer.lora_A.std().item() - 1 / r) <= 6 / r / math.sqrt(2 * layer.lora_A.numel())
        else:
            assert bound * 0.99 < layer.lora_A.abs().max() <= bound
        if init is False:
            assert 0 < layer.lora_B.abs().max() <= 1 / math.sqrt(r)
        else:
            assert not layer.lora_B.any()


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 4.0), (True, 8.0)])
def test_scaling(rslora, scaling):
    layer = trained(r=4, lora_alpha=16, use_rslora=rslora)
    assert layer.scaling == scaling
    x = torch.randn(3, K)
    assert_same_numbers(layer(x), lora_linear(x, *layer_tensors(layer), scaling=scaling))


def layer_tensors(layer):
    return layer.weight, layer.lora_A, layer.lora_B, layer.bias


def test_train_and_eval_govern_dropout():
    layer, x = trained(lora_dropout=0.5), torch.randn(8, K)
    plain = lora_linear(x, *layer_tensors(layer), scaling=2.0)
    assert differ(layer(x), layer(x))
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)
    assert_same_numbers(layer(x), first)
    assert_same_numbers(layer.eval()(x), plain)
    assert differ(layer.train()(x), plain)
    assert_same_numbers(trained(lora_dropout=0.0)(x), plain)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_gradients_go_to_the_adapter_and_to_what_is_unfrozen(backend):
    layer, x = trained(backend=backend), torch.randn(6, K)
    layer(x).square().sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}
    layer.zero_grad()
    layer.weight.requires_grad_()
    layer.bias.requires_grad_()
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())


def test_extra_repr():
    text = repr(trained(lora_dropout=0.1))
    for part in (
        f"in_features={K}",
        f"out_features={N}",
        "bias=True",
        "r=4",
        "lora_alpha=8",
        "lora_dropout=0.1",
        "scaling=2",
    ):
        assert part in text
    assert "merged" not in text
    assert "adapter_dtype" not in text
    mixed = trained(dtype=torch.bfloat16, adapter_dtype=torch.float32, use_rslora=True)
    mixed.merge()
    assert "adapter_dtype=torch.float32" in repr(mixed)
    assert "merged" in repr(mixed)
    assert "scaling=4" in repr(mixed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_adapter_dtype(dtype):
    layer = trained(dtype=dtype, adapter_dtype=torch.float32)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    y = layer(torch.randn(3, K, dtype=dtype))
    y.float().square().sum().backward()
    assert y.dtype == dtype
    assert layer.lora_A.grad.dtype == torch.float32


def test_dtype_moves_take_everything_along():
    # As for every module: a layer moved to 16 bits has 16-bit adapters. Build it with adapter_dtype, or move them back.
    for move, dtype in ((nn.Module.half, torch.float16), (nn.Module.bfloat16, torch.bfloat16)):
        layer = trained(adapter_dtype=torch.float32)
        move(layer)
        assert {p.dtype for p in layer.parameters()} == {dtype}
        layer.lora_A.data, layer.lora_B.data = layer.lora_A.float(), layer.lora_B.float()
        assert layer(torch.randn(3, K, dtype=dtype)).dtype == dtype
    merged = trained()
    merged.merge()
    merged.double()
    merged.unmerge()
    assert {p.dtype for p in merged.parameters()} == {torch.float64}


BAD = {
    "r": [(0, ArgumentError), (513, ArgumentError), (1.5, ArgumentError), (True, ArgumentError)],
    "lora_alpha": [(math.nan, ArgumentError), ("8", ArgumentError), (math.inf, ArgumentError)],
    "lora_dropout": [(1.0, ArgumentError), (-0.1, ArgumentError), (math.nan, ArgumentError)],
    "init_lora_weights": [("pissa", ArgumentError), (None, ArgumentError)],
    "backend": [("cuda", ArgumentError)],
    "adapter_dtype": [(torch.float16, DtypeError), (torch.float64, DtypeError), (torch.int8, DtypeError)],
    "dtype": [
        (torch.int8, DtypeError),
        (torch.complex64, DtypeError),
        (torch.float8_e4m3fn, DtypeError),
    ],
    "in_features": [(0, ArgumentError), (-1, ArgumentError), (2.0, ArgumentError)],
    "out_features": [(0, ArgumentError), (True, ArgumentError)],
}


@pytest.mark.parametrize(("name", "value", "error"), [(n, v, e) for n, cases in BAD.items() for v, e in cases])
def test_bad_arguments(name, value, error):
    with pytest.raises(error, match=rf"^{name} must .*got "):
        LoRALinear(**{"in_features": K, "out_features": N, name: value})
    if name not in ("dtype", "in_features", "out_features"):
        with pytest.raises(error, match=rf"^{name} must .*got "):
            LoRALinear.from_linear(nn.Linear(K, N), **{name: value})


class Quantised(nn.Module):
    in_features, out_features, weight, bias = K, N, torch.zeros(N, K, dtype=torch.int8), None


@pytest.mark.parametrize(
    "linear",
    [
        Quantised(),
        nn.Conv1d(K, N, 1),
        None,
        "linear",
        nn.Bilinear(2, 3, 4),
        nn.LazyLinear(4),
        nn.Linear(K, N).to(torch.float8_e4m3fn),
    ],
    ids=lambda linear: type(linear).__name__,
)
def test_from_what_is_no_plain_linear(linear):
    with pytest.raises(DtypeError, match=r"^linear must be an nn\.Linear with .*got .*"):
        LoRALinear.from_linear(linear)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_training_follows_a_hand_written_layer_in_fp64(p):
    """Ten SGD steps beside five separate ops with the same masks: the curves agree to the rounding of ten steps."""
    layer = trained(dtype=torch.float64, backend="torch")
    tensors = {name: p.detach().clone() for name, p in layer.named_parameters()}
    lora_A, lora_B = tensors["lora_A"].requires_grad_(), tensors["lora_B"].requires_grad_()
    ours = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.05, momentum=0.9)
    theirs = torch.optim.SGD([lora_A, lora_B], lr=0.05, momentum=0.9)
    target = torch.randn(16, N).double()
    losses = []
    for step in range(10):
        x = torch.randn(16, K).double()
        y = lora_linear(x, *layer_tensors(layer), scaling=2.0, dropout_p=p, dropout_seed=step, backend="torch")
        dropped = lora_linear(  # the same mask, seen through an identity
            x, torch.zeros(K, K).double(), torch.eye(K).double(), torch.eye(K).double(), dropout_p=p, dropout_seed=step
        )
        plain = F.linear(x, tensors["weight"], tensors["bias"]) + F.linear(F.linear(dropped, lora_A), lora_B) * 2.0
        pair = [F.mse_loss(out, target) for out in (y, plain)]
        for optimizer, loss in ((ours, pair[0]), (theirs, pair[1])):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append([loss.item() for loss in pair])
    assert losses[-1][0] < losses[0][0]
    # Each step adds a few hundred roundings of 2^-53 and the contraction of SGD does not amplify them.
    for mine, other in losses:
        assert abs(mine - other) <= 10 * 500 * 2**-53 * other
    assert (layer.lora_A - lora_A).norm() <= 10 * 500 * 2**-53 * lora_A.norm()
    assert (layer.lora_B - lora_B).norm() <= 10 * 500 * 2**-53 * lora_B.norm()


def test_layer_is_the_function():
    inputs = whole(make_linear_inputs(7, N, K, R, dtype=torch.float32))
    layer = in_whole_numbers(trained())
    tensors = dict(zip(("weight", "lora_A", "lora_B", "bias"), (p.detach() for p in layer_tensors(layer)), strict=True))
    expected = run_linear(replace(inputs, **tensors, scaling=2.0), "auto")
    for p in layer.parameters():
        p.requires_grad_()
    x = inputs.x.clone().requires_grad_()
    y = layer(x)
    y.backward(inputs.dy)
    assert torch.equal(y, expected["y"])
    assert torch.equal(x.grad, expected["d_x"])
    assert all(torch.equal(p.grad, expected[f"d_{name}"]) for name, p in layer.named_parameters())


def test_nn_transforms_take_it_for_a_linear():
    model = nn.Sequential(LoRALinear(K, N, r=R), nn.ReLU(), LoRALinear(N, 3, r=2))
    model.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)
    state = model.state_dict()
    stateless = partial(torch.func.functional_call, model, state)
    x = torch.randn(2, K)
    assert_same_numbers(stateless((x,)), model(x))


def test_from_linear_refuses_what_it_would_break():
    weight_norm = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(6, 4))
    for base in (LoRALinear(6, 4, r=2), weight_norm):
        with pytest.raises(DtypeError, match=r"^linear must be an nn\.Linear with .*merge its adapter or remove"):
            LoRALinear.from_linear(base)
    assert all(p.requires_grad for p in weight_norm.parameters())
