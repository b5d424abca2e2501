"""`LoRALinear.merge` and `unmerge`: the sum in the weight, and the weight back to the bit."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_kernels import LoRALinear
from lora_kernels.testing import budget_rows
from tests.equality import assert_rounded_once, assert_same_numbers, in_whole_numbers

K, N, R = 24, 20, 4
STATE = {"weight", "bias", "lora_A", "lora_B"}


def trained(**options) -> LoRALinear:
    """A layer whose update is not zero, as after training."""
    torch.manual_seed(0)
    return LoRALinear(K, N, **{"r": R, "lora_alpha": 8, "init_lora_weights": False, **options})


MERGE_DTYPES = [
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.float16, None),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float64, None),
]


@pytest.mark.parametrize(("dtype", "adapter_dtype"), MERGE_DTYPES, ids=str)
def test_merge_and_unmerge(dtype, adapter_dtype):
    layer = trained(dtype=dtype, adapter_dtype=adapter_dtype, lora_dropout=0.5)
    base, before = layer.weight, layer.weight.clone()
    assert not layer.merged
    layer.merge()
    assert layer.merged
    assert not torch.equal(layer.weight, before)
    assert torch.equal(base, before)
    once = layer.weight
    layer.merge()
    assert layer.weight is once
    layer.unmerge()
    layer.unmerge()
    assert not layer.merged
    assert layer.weight is base
    assert torch.equal(layer.weight, before)
    assert set(dict(layer.named_parameters())) == STATE


@pytest.mark.parametrize(("dtype", "adapter_dtype"), MERGE_DTYPES[:5], ids=str)
def test_merged_output_is_within_budget(dtype, adapter_dtype):
    layer = trained(dtype=dtype, adapter_dtype=adapter_dtype).eval()
    x = torch.randn(64, K, dtype=dtype)
    weight, lora_A, lora_B, bias = (p.detach() for p in (layer.weight, layer.lora_A, layer.lora_B, layer.bias))
    layer.merge()
    wide = weight.double() + layer.scaling * lora_B.double() @ lora_A.double()
    # What an eager merge does: the update in the adapters' dtype, added in the weight's.
    eager = weight + (layer.scaling * (lora_B @ lora_A)).to(dtype)
    rows = budget_rows(
        {"weight": layer.weight.detach(), "y": layer(x).detach()},
        {"weight": eager, "y": F.linear(x, eager, bias)},
        {"weight": wide, "y": F.linear(x.double(), wide, bias.double())},
    )
    assert all(row.ok for row in rows), rows
    # What fp32 makes of r products, their scaling and the sum; then one rounding.
    terms = weight.double().abs() + layer.scaling * lora_B.double().abs() @ lora_A.double().abs()
    assert_rounded_once(layer.weight, wide, slack=(R + 2) * 2**-24 * terms)


def test_merged_layer_is_a_plain_linear():
    layer, x = trained(lora_dropout=0.9), torch.randn(5, K, requires_grad=True)
    layer.merge()
    y = layer(x)
    assert_same_numbers(y, F.linear(x, layer.weight, layer.bias))
    y.sum().backward()
    assert x.grad is not None
    assert layer.lora_A.grad is None


def test_merge_of_an_unfrozen_weight_keeps_it_so():
    layer = trained()
    layer.weight.requires_grad_()
    layer.merge()
    assert layer.weight.requires_grad
    layer.unmerge()
    assert layer.weight.requires_grad


def test_state_dict_of_a_merged_layer_is_the_unmerged_one():
    layer = trained()
    expected = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.merge()
    state = layer.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    inside = nn.Sequential(layer).state_dict()
    assert list(inside) == [f"0.{name}" for name in expected]


def test_loading_into_a_merged_layer_merges_what_was_loaded():
    layer, other = in_whole_numbers(trained()), in_whole_numbers(trained())
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(-2)
    layer.merge()
    layer.load_state_dict(other.state_dict())
    assert layer.merged
    other.merge()
    assert torch.equal(layer.weight, other.weight)
    layer.unmerge()
    other.unmerge()
    assert torch.equal(layer.weight, other.weight)


def test_loading_into_a_merged_layer_does_not_write_to_a_refused_state():
    layer = trained()
    layer.merge()
    merged = layer.weight.clone()
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({})
    assert layer.merged
    assert torch.equal(layer.weight, merged)


def test_reset_parameters_of_a_merged_layer_resets_the_base():
    layer = LoRALinear(6, 4, r=2, init_lora_weights=False)
    before = layer.weight.clone()
    layer.merge()
    layer.reset_parameters()
    assert not layer.merged
    assert not torch.equal(layer.weight, before)
