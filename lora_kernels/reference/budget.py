"""The error budget: at most twice the error that eager PyTorch makes in that dtype, both held against fp64.

error(a) = ||a - truth|| / ||truth||, Frobenius, in fp64. There is no hand-picked tolerance: where eager happens to be
exact (a gradient of one element, a product of powers of two), the budget is what rounding the truth itself to the dtype
costs at most, half a unit in the last place of every element.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

ERROR_FACTOR = 2.0


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """||actual - truth|| / ||truth|| in fp64; a NaN or Inf that truth does not have is an infinite error."""
    if actual.shape != truth.shape:
        raise ValueError(f"actual must have truth's shape {list(truth.shape)}; got {list(actual.shape)}")
    truth = truth.detach().double()
    actual = actual.detach().to(truth.device, torch.float64)
    difference = (actual - truth).norm().item()
    if not math.isfinite(difference):
        return math.inf
    scale = truth.norm().item()
    return difference / scale if scale > 0 else (0.0 if difference == 0 else math.inf)


class BudgetRow(NamedTuple):
    """One tensor's error against fp64 beside eager's, and whether it is within the budget."""

    name: str
    error: float
    eager_error: float
    limit: float

    @property
    def ok(self) -> bool:
        """Whether the error is within the budget; NaN is not."""
        return self.error <= self.limit


def error_limit(eager: Tensor, truth: Tensor) -> tuple[float, float]:
    """(eager's error, what an implementation is allowed): twice that, and never less than rounding truth may cost."""
    eager_error = relative_error(eager, truth)
    return eager_error, max(ERROR_FACTOR * eager_error, torch.finfo(eager.dtype).eps / 2)


def budget_rows(
    actual: Mapping[str, Tensor], eager: Mapping[str, Tensor], truth: Mapping[str, Tensor]
) -> list[BudgetRow]:
    """A row for every tensor of `truth`.

    Args:
        actual: tensors of the implementation under test, by name.
        eager: the same computed by plain PyTorch in the same dtypes.
        truth: the same computed in fp64 from the same (already rounded) inputs.

    Returns:
        One BudgetRow for each name, in truth's order.

    Raises:
        ValueError: a shape or dtype differs from eager's.
    """
    rows = []
    for name, exact in truth.items():
        if actual[name].dtype != eager[name].dtype:
            raise ValueError(f"{name} must have eager's dtype {eager[name].dtype}; got {actual[name].dtype}")
        eager_error, limit = error_limit(eager[name], exact)
        rows.append(BudgetRow(name, relative_error(actual[name], exact), eager_error, limit))
    return rows
