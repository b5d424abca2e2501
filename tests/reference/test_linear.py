"""The specification against itself: gradcheck, and the identities that define a LoRA linear."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from lora_kernels.reference.linear import drop, linear_backward, linear_forward, lora_linear
from lora_kernels.reference.philox import dropout_scale, keep_mask
from lora_kernels.testing import LinearInputs, make_linear_inputs, relative_error
from tests.equality import whole

# fp64 rounding over sums of at most 64 terms: each result carries at most 2 * 64 roundings of 2^-53, in three products.
FP64_ROUNDING = 3 * 2 * 64 * 2**-53
SIZES = [(5, 7, 6, 3), (4, 3, 16, 1), (1, 1, 1, 1), (9, 2, 11, 17)]
DROPOUT = [0.0, 0.3, 0.9]


def fp64_inputs(size=(5, 7, 6, 3), **options) -> LinearInputs:
    return make_linear_inputs(*size, dtype=torch.float64, **options)


def seed_of(inputs: LinearInputs):
    return torch.tensor([inputs.dropout_seed]) if inputs.dropout_p > 0 else None


def y_of(inputs: LinearInputs) -> torch.Tensor:
    i = inputs
    return lora_linear(
        i.x, i.weight, i.lora_A, i.lora_B, i.bias, scaling=i.scaling, dropout_p=i.dropout_p, seed=seed_of(i)
    )


def assert_equal_to_rounding(actual, expected):
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype == torch.float64
    assert relative_error(actual, expected) <= FP64_ROUNDING


class HandDerived(torch.autograd.Function):
    """linear_forward and linear_backward as one node, for gradcheck."""

    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, bias, seed, scaling, p):
        y, xa = linear_forward(x, weight, lora_A, lora_B, bias, seed, scaling, p)
        ctx.save_for_backward(x, weight, lora_A, lora_B, xa)
        ctx.rest = seed, scaling, p
        return y

    @staticmethod
    def backward(ctx, dy):
        return (*linear_backward(dy, *ctx.saved_tensors, *ctx.rest), None, None, None)


@pytest.mark.parametrize("p", DROPOUT)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("function", ["autograd", "hand-derived"])
def test_gradcheck(function, bias, p):
    inputs = fp64_inputs(bias=bias, dropout_p=p, scaling=1.7)
    seed = seed_of(inputs)
    tensors = [inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, *([inputs.bias] if bias else [])]

    def call(x, weight, lora_A, lora_B, b=None):
        if function == "autograd":
            return lora_linear(x, weight, lora_A, lora_B, b, scaling=1.7, dropout_p=p, seed=seed)
        return HandDerived.apply(x, weight, lora_A, lora_B, torch.zeros(7).double() if b is None else b, seed, 1.7, p)

    leaves = [t.clone().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(call, leaves)
    if function == "autograd":
        assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("p", DROPOUT)
@pytest.mark.parametrize("bias", [True, False])
def test_hand_derived_gradients_are_autograds(size, bias, p):
    inputs = fp64_inputs(size, bias=bias, dropout_p=p, scaling=-0.7)
    names = ("x", "weight", "lora_A", "lora_B", *(("bias",) if bias else ()))
    leaves = {name: getattr(inputs, name).clone().requires_grad_() for name in names}
    y = y_of(replace(inputs, **leaves))
    expected = torch.autograd.grad(y, list(leaves.values()), inputs.dy)

    i = inputs
    by_hand, xa = linear_forward(i.x, i.weight, i.lora_A, i.lora_B, i.bias, seed_of(i), i.scaling, p)
    assert_equal_to_rounding(by_hand, y.detach())
    gradients = linear_backward(i.dy, i.x, i.weight, i.lora_A, i.lora_B, xa, seed_of(i), i.scaling, p)
    for name, gradient in zip(names, expected, strict=True):
        assert_equal_to_rounding(getattr(gradients, name), gradient)


@pytest.mark.parametrize("size", SIZES)
def test_merge_equivalence(size):
    inputs = fp64_inputs(size)
    merged = inputs.weight + inputs.scaling * inputs.lora_B @ inputs.lora_A
    assert_equal_to_rounding(y_of(inputs), F.linear(inputs.x, merged, inputs.bias))


@pytest.mark.parametrize("p", DROPOUT)
def test_merge_equivalence_under_dropout_is_that_of_the_dropped_input(p):
    inputs = fp64_inputs(dropout_p=p)
    low_rank = drop(inputs.x, p, seed_of(inputs)) @ (inputs.scaling * inputs.lora_B @ inputs.lora_A).T
    assert_equal_to_rounding(y_of(inputs), F.linear(inputs.x, inputs.weight, inputs.bias) + low_rank)


@pytest.mark.parametrize("zero", ["lora_A", "lora_B", "scaling"])
@pytest.mark.parametrize("p", DROPOUT)
def test_without_an_update_it_is_the_base(zero, p):
    inputs = fp64_inputs(dropout_p=p)
    inputs = replace(inputs, **{zero: 0.0 if zero == "scaling" else torch.zeros_like(getattr(inputs, zero))})
    assert_equal_to_rounding(y_of(inputs), F.linear(inputs.x, inputs.weight, inputs.bias))


def test_no_seed_and_p_zero_are_no_dropout():
    i = whole(fp64_inputs())
    plain = y_of(i)
    zero = lora_linear(
        i.x, i.weight, i.lora_A, i.lora_B, i.bias, scaling=i.scaling, dropout_p=0.0, seed=torch.tensor([4])
    )
    assert torch.equal(plain, zero)
    assert drop(i.x, 0.5, None) is i.x


@pytest.mark.parametrize("p", DROPOUT)
def test_linear_in_x(p):
    inputs = replace(fp64_inputs(dropout_p=p), bias=None)
    other = torch.randn_like(inputs.x)
    total = y_of(replace(inputs, x=2 * inputs.x - 3 * other))
    assert_equal_to_rounding(total, 2 * y_of(inputs) - 3 * y_of(replace(inputs, x=other)))


@pytest.mark.parametrize("p", DROPOUT)
@pytest.mark.parametrize("parameter", ["lora_A", "lora_B"])
def test_update_is_linear_in_each_adapter(parameter, p):
    inputs = fp64_inputs(dropout_p=p)
    base = F.linear(inputs.x, inputs.weight, inputs.bias)
    doubled = y_of(replace(inputs, **{parameter: 2 * getattr(inputs, parameter)}))
    assert_equal_to_rounding(doubled - base, 2 * (y_of(inputs) - base))


@pytest.mark.parametrize("p", [0.25, 0.5])
def test_drop_is_the_mask_times_the_scale(p):
    x, seed = torch.randn(33, 19).double(), torch.tensor([8])
    dropped, keep = drop(x, p, seed), keep_mask(seed, 33, 19, p)
    assert torch.equal(dropped[keep], x[keep] * dropout_scale(p))
    assert (dropped[~keep] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_dropped_elements_are_exactly_zero(value):
    seed = torch.tensor([8])
    keep = keep_mask(seed, 16, 16, 0.5)
    dropped = drop(torch.full((16, 16), value), 0.5, seed)
    assert (dropped[~keep] == 0).all()
    assert not dropped[keep].isfinite().any()


def test_dropout_is_unbiased_in_y():
    inputs, runs = fp64_inputs((2, 3, 8, 2)), 2000
    exact = y_of(inputs)
    samples = torch.stack([y_of(replace(inputs, dropout_p=0.4, dropout_seed=s)) for s in range(runs)])
    # Six standard errors of the sample mean, from the samples themselves.
    assert ((samples.mean(0) - exact).abs() <= 6 * samples.std(0) / runs**0.5).all()


def test_saved_product_carries_scaling_and_dropout_scale():
    i = fp64_inputs(dropout_p=0.5)
    _, xa = linear_forward(i.x, i.weight, i.lora_A, i.lora_B, i.bias, seed_of(i), i.scaling, 0.5)
    keep = keep_mask(seed_of(i), 5, 6, 0.5)
    assert_equal_to_rounding(xa, i.scaling * 2.0 * (keep * i.x) @ i.lora_A.T)
