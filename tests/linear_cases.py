"""What the tests of the operations share: dtypes, awkward layouts, and the error budget as an assertion."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import reduce
from itertools import chain, combinations
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_kernels.testing import (
    BranchInputs,
    LinearInputs,
    budget_rows,
    order_errors,
    relative_error,
    run_branch,
    run_linear,
)
from tests.equality import assert_rounded_once

Inputs = LinearInputs | BranchInputs

PARAMETERS = ("x", "weight", "lora_A", "lora_B", "bias")
SUBSETS = list(chain.from_iterable(combinations(PARAMETERS, size) for size in range(len(PARAMETERS) + 1)))

# x's dtype and the adapters'.
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16-mixed": (torch.float16, torch.float32),
    "bf16-mixed": (torch.bfloat16, torch.float32),
}
LAYOUTS = ("contiguous", "transposed", "strided", "offset", "expanded")


def laid_out(t: Tensor, layout: str) -> Tensor:
    """t's numbers (of its first row, where expanded) in another memory layout; 1-D tensors have fewer of them."""
    if layout == "transposed" and t.dim() > 1:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "strided":
        return torch.stack([t, torch.full_like(t, math.nan)], dim=-1)[..., 0]
    if layout == "offset":  # an odd first address and an odd row stride
        padded = t.new_full((*t.shape[:-1], t.shape[-1] + 3), math.nan)
        padded[..., 1:-2] = t
        return padded[..., 1:-2]
    if layout == "expanded":
        return t[:1].expand_as(t)
    return t.contiguous()


def with_layouts(inputs: Inputs, **layouts: str) -> Inputs:
    """inputs with some tensors laid out anew, by name."""
    return replace(inputs, **{name: laid_out(getattr(inputs, name), layout) for name, layout in layouts.items()})


def pooled(make: Callable[..., Inputs], m: int, n: int, k: int, r: int, **options) -> list[Inputs]:
    """As many problems of a size, with seeds of their own, as make 100 independent roundings in every tensor.

    The norm of 100 errors varies by 7%. y and the gradients inherit the roundings of xa and dyb, [M, R]; dropout thins
    them out. At most 50 problems: the norm of 50 errors varies by 10%.
    """
    fewest = min(m * n, m * k, m * r, r * k, n * r, n if options.get("bias", True) else n * r)
    count = math.ceil(100 / (fewest * (1 - options.get("dropout_p", 0.0))))
    return [make(m, n, k, r, seed=seed, **options) for seed in range(min(count, 50))]


def eager_of(inputs: Inputs) -> dict[str, Tensor]:
    """y and every gradient by plain PyTorch in the inputs' own dtypes."""
    return (run_linear if isinstance(inputs, LinearInputs) else run_branch)(inputs, "reference")


def truth_of(inputs: Inputs) -> dict[str, Tensor]:
    """The same in fp64, on the CPU."""
    return eager_of(inputs.double())


def assert_within_budget(problems: Inputs | Iterable[Inputs], run: Callable[[Inputs], dict[str, Tensor]]) -> None:
    """Every tensor that `run` returns has at most twice eager's error against fp64, or what another order costs.

    The budget compares norms of errors. Over a handful of elements eager's norm is a matter of luck, so tiny problems
    come as several (`pooled`), whose elements make one tensor for each name.
    """
    problems = [problems] if isinstance(problems, Inputs) else list(problems)
    if problems[0].x.dtype == torch.float64:
        for problem in problems:
            _assert_fp64_rounding(run(problem), problem)
        return
    runs = [(run(p), eager_of(p), truth_of(p)) for p in problems]
    actual, eager, truth = (
        {name: torch.cat([results[name].detach().cpu().reshape(-1) for results in side]) for name in runs[0][0]}
        for side in zip(*runs, strict=True)
    )
    failed = [row for row in budget_rows(actual, eager, truth, order_errors(truth, *problems)) if not row.ok]
    assert not failed, "\n".join(f"{r.name}: {r.error:.2e} > {r.limit:.2e} (eager {r.eager_error:.2e})" for r in failed)


def _assert_fp64_rounding(actual: dict[str, Tensor], inputs: Inputs) -> None:
    """fp64 has no better truth to be held against, so it is held to the textbook bound, element by element.

    A chain of sums with n roundings errs by at most n u times the same chain over absolute values; two such chains
    differ by at most twice that (Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1).
    """
    expected, majorant = eager_of(inputs), majorant_of(inputs)
    for name, value in actual.items():
        assert value.dtype == torch.float64
        assert ((value - expected[name]).abs() <= 2 * roundings_of(inputs) * 2**-53 * majorant[name]).all(), name


def majorant_of(inputs: Inputs) -> dict[str, Tensor]:
    """y and every gradient as sums of absolute values, in fp64."""
    wide = inputs.double()
    tensors = {name: t.abs() for name, t in vars(wide).items() if isinstance(t, Tensor)}
    return eager_of(replace(wide, **tensors, scaling=abs(inputs.scaling)))


def roundings_of(inputs: Inputs) -> int:
    """How often a result of the call is rounded at most, in whatever order its sums are added."""
    n, (r, k) = inputs.lora_B.shape[0], inputs.lora_A.shape
    return inputs.x.numel() // k + n + k + r + 8


def assert_rounded_once_each(inputs: Inputs, actual: dict[str, Tensor], *, of_products: float = 0.0) -> None:
    """Each tensor, to 16 bits, from sums that fp32 adapters and accumulation know to some 1e-5 of their majorants.

    of_products: what a product of two fp32 numbers may lose, relative to it.
    """
    truth, majorant = truth_of(inputs), majorant_of(inputs)
    for name, value in actual.items():
        slack = (roundings_of(inputs) * 2**-24 + of_products) * majorant[name]
        assert_rounded_once(value, truth[name], slack)


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, dtypes and values, NaN equal to NaN."""
    assert set(actual) == set(expected)
    differing = {
        name
        for name, value in actual.items()
        if value.dtype != expected[name].dtype or not torch.equal(value.nan_to_num(), expected[name].nan_to_num())
    }
    assert differing == set()


class Allocations(TorchDispatchMode):
    """Storages that ops inside the block made: size in bytes and dtype by address, and every (shape, dtype) seen."""

    def __init__(self):
        super().__init__()
        self.kept_alive, self.fresh, self.seen = [], {}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self.seen.add((tuple(t.shape), t.dtype))
                address = t.untyped_storage().data_ptr()
                if address not in given and address not in self.fresh:
                    self.fresh[address] = t.untyped_storage().nbytes()
                    self.kept_alive.append(t)  # so that no address is given out twice
        return out


class Nothing(TorchDispatchMode):
    """Any op at all inside the block is a failure."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} ran before the arguments were refused")


# Where fp16 is short of exponents: what is stored of the rank, and what is made of it.
STORED = {"xa": ("y", "d_lora_B"), "dyb": ("d_x", "d_lora_A")}


SCALINGS = (1 / 64, 1.0, 32.0, 512.0)


def over_fp16s_range(*scalings: float) -> Callable[[Callable[..., None]], Any]:
    """Parametrizes a test by p, by scalings far from one, and by the stored product that they may take out of range."""
    import pytest  # `bench.compiled_ahead` takes this module's dtypes where no test is run

    marks = (
        pytest.mark.parametrize("stored", STORED),
        pytest.mark.parametrize("scaling", scalings or SCALINGS),
        pytest.mark.parametrize("p", [0.0, 0.25], ids=["plain", "dropout"]),
    )
    return lambda test: reduce(lambda so_far, mark: mark(so_far), marks, test)


def far_from_one(inputs: Inputs, stored: str) -> Inputs:
    """The problem with its stored product 2^8 times as large, 1e5 under the largest scaling, and small factors else."""
    large, small, outer = ("lora_A", "lora_B", "dy") if stored == "xa" else ("lora_B", "lora_A", "x")
    factors = {large: 2.0**8, small: 2.0**-8, outer: 2.0**-10}
    return replace(inputs, **{name: getattr(inputs, name) * factor for name, factor in factors.items()})


def assert_in_range(inputs: Inputs, stored: str, found: dict[str, Tensor]) -> None:
    """What is made of the stored product has at most three roundings: its own, the result's, and one in between."""
    truth = truth_of(inputs)
    for name in STORED[stored]:
        unit = max(torch.finfo(found[name].dtype).eps / 2, 2.0**-11)
        assert relative_error(found[name], truth[name]) < 3 * unit, name
