"""What two runs of one computation may be held to: the same bits, or the same numbers but for the order of additions.

This package answers for bits where no library computes: masks, kernels, what merge and unmerge write, files. A
library's GEMM may add in another order for operands at another address, on another processor or on other threads, and
no test controls all of these. There are two ways to compare what it has computed:

- in whole numbers (`whole`): small enough that every sum is exact, in whatever order, so that the bits are ours again;
- to rounding (`assert_same_numbers`), where a model's activations and norms leave no whole numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora_kernels.testing import BranchInputs, LinearInputs

Inputs = TypeVar("Inputs", LinearInputs, BranchInputs)

# Of the largest element. In fp32 and fp64: the models of these tests have up to six products in a row, of at most 100
# terms, and another order costs each some ten eps (lora_kernels.reference.budget); the rest is for what norms,
# activations and backward amplify. In 16 bits products are exact to some 1e-5 eps, and a rounding falls to the other
# side where a sum lies next to a tie: one eps, and what the layers behind make of it.
ROUNDINGS = {torch.float64: 256, torch.float32: 256, torch.bfloat16: 8, torch.float16: 8}


def assert_same_numbers(actual: Any, expected: Any, where: str = "") -> None:
    """Equal but for the order of a library's additions: tensors, or mappings and sequences of them."""
    if isinstance(expected, Mapping):
        assert set(actual) == set(expected), where
        for name, value in expected.items():
            assert_same_numbers(actual[name], value, f"{where} {name}")
    elif isinstance(expected, Sequence):
        assert len(actual) == len(expected), where
        for number, (one, other) in enumerate(zip(actual, expected, strict=True)):
            assert_same_numbers(one, other, f"{where} {number}")
    elif not expected.is_floating_point():
        assert torch.equal(actual, expected), where
    else:
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), where
        atol = ROUNDINGS[expected.dtype] * torch.finfo(expected.dtype).eps * _largest(expected)
        torch.testing.assert_close(actual, expected, rtol=0, atol=atol, equal_nan=True, msg=lambda m: f"{where}\n{m}")


def differ(one: Tensor, other: Tensor) -> bool:
    """Whether they differ by more than the order of additions can explain."""
    try:
        assert_same_numbers(one, other)
    except AssertionError:
        return True
    return False


def assert_rounded_once(actual: Tensor, truth: Tensor, slack: Tensor) -> None:
    """Every element is truth's, rounded to actual's dtype, truth itself being known to within slack.

    Half a unit in the last place is all that one rounding costs; a second one would cost as much again.
    """
    _, exponent = torch.frexp(truth)  # truth = m 2^exponent, 1/2 <= m < 1
    half_unit = torch.ldexp(torch.full_like(truth, torch.finfo(actual.dtype).eps / 4), exponent)
    half_unit = half_unit.clamp_min(torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps / 2)
    excess = (actual.detach().double() - truth).abs() - half_unit
    beyond = excess > slack
    assert not beyond.any(), (
        f"{beyond.sum()} of {beyond.numel()} elements, by up to {(excess / half_unit).max()} of one"
    )


def _largest(t: Tensor) -> float:
    finite = t.detach()[t.detach().isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def whole(inputs: Inputs) -> Inputs:
    """The problem in whole numbers of at most 1 in size, of which sums of up to 2^24 are exact in fp32 in any order.

    That is so with a scaling, and a 1 / (1 - p), that are powers of two. What is rounded to 16 bits in between is
    rounded from an exact sum.
    """
    return replace(
        inputs, **{name: whole_numbers(t) for name, t in vars(inputs).items() if isinstance(t, Tensor) and t.dim()}
    )


def whole_numbers(t: Tensor) -> Tensor:
    """-1, 0 and 1 in t's dtype, by sign and size: a third of t's elements is small."""
    large = t.detach().abs() > 0.4 * t.detach().double().square().mean().sqrt()
    return torch.where(large, t.detach().sign(), 0)


@torch.no_grad()
def in_whole_numbers(model: nn.Module) -> nn.Module:
    """The model itself, its parameters made whole in place."""
    for parameter in model.parameters():
        parameter.copy_(whole_numbers(parameter))
    return model
