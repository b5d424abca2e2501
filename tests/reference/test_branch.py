"""The specification of the branch against itself and against the linear's: gradcheck, and identities."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from lora_kernels.reference.branch import branch_backward, branch_forward, lora_branch
from lora_kernels.reference.linear import drop, lora_linear
from lora_kernels.reference.philox import keep_mask
from lora_kernels.testing import BranchInputs, make_branch_inputs, make_linear_inputs, relative_error
from tests.equality import assert_same_numbers

# fp64 rounding over sums of at most 64 terms: each result carries at most 2 * 64 roundings of 2^-53, in three products.
FP64_ROUNDING = 3 * 2 * 64 * 2**-53
SIZES = [(5, 7, 6, 3), (4, 3, 16, 1), (1, 1, 1, 1), (9, 2, 11, 17)]
DROPOUT = [0.0, 0.3, 0.9]


def fp64_inputs(size=(5, 7, 6, 3), **options) -> BranchInputs:
    return make_branch_inputs(*size, dtype=torch.float64, **options)


def seed_of(inputs):
    return torch.tensor([inputs.dropout_seed]) if inputs.dropout_p > 0 else None


def y_of(inputs: BranchInputs) -> torch.Tensor:
    i = inputs
    return lora_branch(i.base_out, i.x, i.lora_A, i.lora_B, scaling=i.scaling, dropout_p=i.dropout_p, seed=seed_of(i))


def assert_equal_to_rounding(actual, expected):
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype == torch.float64
    assert relative_error(actual, expected) <= FP64_ROUNDING


class HandDerived(torch.autograd.Function):
    """branch_forward and branch_backward as one node, for gradcheck."""

    @staticmethod
    def forward(ctx, base_out, x, lora_A, lora_B, seed, scaling, p):
        y, xa = branch_forward(base_out, x, lora_A, lora_B, seed, scaling, p)
        ctx.save_for_backward(x, lora_A, lora_B, xa)
        ctx.rest = seed, scaling, p
        return y

    @staticmethod
    def backward(ctx, dy):
        return (*branch_backward(dy, *ctx.saved_tensors, *ctx.rest), None, None, None)


@pytest.mark.parametrize("p", DROPOUT)
@pytest.mark.parametrize("function", ["autograd", "hand-derived"])
def test_gradcheck(function, p):
    inputs = fp64_inputs(dropout_p=p, scaling=1.7)
    seed = seed_of(inputs)

    def call(*tensors):
        if function == "autograd":
            return lora_branch(*tensors, scaling=1.7, dropout_p=p, seed=seed)
        return HandDerived.apply(*tensors, seed, 1.7, p)

    leaves = [t.clone().requires_grad_() for t in (inputs.base_out, inputs.x, inputs.lora_A, inputs.lora_B)]
    assert torch.autograd.gradcheck(call, leaves)
    if function == "autograd":
        assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("p", DROPOUT)
def test_hand_derived_gradients_are_autograds(size, p):
    i = fp64_inputs(size, dropout_p=p, scaling=-0.7)
    names = ("base_out", "x", "lora_A", "lora_B")
    leaves = {name: getattr(i, name).clone().requires_grad_() for name in names}
    y = y_of(replace(i, **leaves))
    expected = torch.autograd.grad(y, list(leaves.values()), i.dy)

    by_hand, xa = branch_forward(i.base_out, i.x, i.lora_A, i.lora_B, seed_of(i), i.scaling, p)
    assert_equal_to_rounding(by_hand, y.detach())
    gradients = branch_backward(i.dy, i.x, i.lora_A, i.lora_B, xa, seed_of(i), i.scaling, p)
    for name, gradient in zip(names, expected, strict=True):
        assert_equal_to_rounding(getattr(gradients, name), gradient)
    assert gradients.base_out is i.dy


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("p", DROPOUT)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_over_a_linear_base_it_is_the_linear(size, p, dtype):
    # Gradients included: the specification of the one is that of the other, cut in two.
    i = make_linear_inputs(*size, dtype=dtype, dropout_p=p, seed=3)
    results = []
    for cut in (False, True):
        leaves = [t.clone().requires_grad_() for t in (i.x, i.weight, i.lora_A, i.lora_B, i.bias)]
        x, weight, lora_A, lora_B, bias = leaves
        options = {"scaling": i.scaling, "dropout_p": p, "seed": seed_of(i)}
        if cut:
            y = lora_branch(F.linear(x, weight, bias), x, lora_A, lora_B, **options)
        else:
            y = lora_linear(x, weight, lora_A, lora_B, bias, **options)
        results.append((y, *torch.autograd.grad(y, leaves, i.dy)))
    assert_same_numbers(*results)


@pytest.mark.parametrize("size", SIZES)
def test_a_base_of_zero_is_the_merged_update(size):
    inputs = fp64_inputs(size)
    update = inputs.scaling * inputs.lora_B @ inputs.lora_A
    zero = replace(inputs, base_out=torch.zeros_like(inputs.base_out))
    assert_equal_to_rounding(y_of(zero), inputs.x @ update.T)


@pytest.mark.parametrize("p", DROPOUT)
def test_under_dropout_it_is_the_dropped_inputs_update(p):
    inputs = fp64_inputs(dropout_p=p)
    low_rank = drop(inputs.x, p, seed_of(inputs)) @ (inputs.scaling * inputs.lora_B @ inputs.lora_A).T
    assert_equal_to_rounding(y_of(inputs), inputs.base_out + low_rank)


@pytest.mark.parametrize("zero", ["lora_A", "lora_B", "scaling"])
@pytest.mark.parametrize("p", DROPOUT)
def test_without_an_update_it_is_the_base(zero, p):
    inputs = fp64_inputs(dropout_p=p)
    inputs = replace(inputs, **{zero: 0.0 if zero == "scaling" else torch.zeros_like(getattr(inputs, zero))})
    assert torch.equal(y_of(inputs), inputs.base_out)


@pytest.mark.parametrize("p", DROPOUT)
def test_two_branches_add_up_to_one_of_both_ranks(p):
    # Concatenated adapters are the sum of their terms, under one mask.
    inputs, other = fp64_inputs(dropout_p=p), fp64_inputs((5, 7, 6, 2), dropout_p=p)
    first = y_of(inputs)
    both = y_of(replace(inputs, base_out=first, lora_A=other.lora_A, lora_B=other.lora_B))
    lora_A, lora_B = torch.cat([inputs.lora_A, other.lora_A]), torch.cat([inputs.lora_B, other.lora_B], 1)
    assert_equal_to_rounding(both, y_of(replace(inputs, lora_A=lora_A, lora_B=lora_B)))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_y_and_gradients_have_their_own_tensors_dtypes(dtype, out_dtype):
    i = make_branch_inputs(5, 7, 6, 3, dtype=dtype, adapter_dtype=torch.float32, out_dtype=out_dtype, dropout_p=0.3)
    leaves = [t.clone().requires_grad_() for t in (i.base_out, i.x, i.lora_A, i.lora_B)]
    y = lora_branch(*leaves, dropout_p=0.3, seed=seed_of(i))
    assert y.dtype == out_dtype
    gradients = torch.autograd.grad(y, leaves, i.dy)
    assert [g.dtype for g in gradients] == [out_dtype, dtype, torch.float32, torch.float32]
    assert torch.equal(gradients[0], i.dy)


def test_saved_product_carries_scaling_and_dropout_scale():
    i = fp64_inputs(dropout_p=0.5)
    _, xa = branch_forward(i.base_out, i.x, i.lora_A, i.lora_B, seed_of(i), i.scaling, 0.5)
    keep = keep_mask(seed_of(i), 5, 6, 0.5)
    assert_equal_to_rounding(xa, i.scaling * 2.0 * (keep * i.x) @ i.lora_A.T)
