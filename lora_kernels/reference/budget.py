"""The error budget: at most twice the error that eager PyTorch makes in that dtype, both held against fp64.

error(a) = ||a - truth|| / ||truth||, Frobenius, in fp64. Eager's error is one draw: a library adds in the order that
suits the processor, its caches and its operands' addresses, and two right orders differ. So the budget has a floor,
below which a smaller error of eager's is luck and no standard:

- rounding the truth itself to the dtype, at most u of each element (u = eps / 2, half a unit in the last place);
- adding in another order, `order_error`. Let n terms with sum S and sum of squares Q be added one after the other, in
  an order drawn at random. The sum of the first k has a mean square of S^2 k (k - 1) / (n (n - 1)) + Q k (n - k) /
  (n (n - 1)), all n of them together (n + 1) (2 S^2 + Q) / 6. Each is rounded by up to u_acc of itself; roundings taken
  as independent, uniform and of mean zero (Higham and Mary, "A new approach to probabilistic rounding error analysis",
  2019), the mean square of the error is u_acc^2 (n + 1) (2 S^2 + Q) / 18. The floor is twice its root: u_acc times the
  condition of the sum, sqrt(2 S^2 + Q) / S, times sqrt(2 (n + 1)) / 3. Blocks and trees round smaller sums, and fewer.
  For the sums of tests it is some ten ulps in fp32; of 16 bits, which are accumulated in fp32, a ten-thousandth of one.
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


def order_error(truth: Tensor, squares: Tensor, terms: int, dtype: torch.dtype) -> float:
    """How far sums may lie from truth for the order of their additions alone, relative to truth's norm.

    Args:
        truth: the sums, S.
        squares: Q, the same sums of squared terms, in truth's shape.
        terms: n, how many are in one sum; of a chain of sums, in all of them.
        dtype: of the operands; 16-bit ones are accumulated in fp32.
    """
    scale = truth.norm().item()
    unit = min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) / 2
    mean_square = (terms + 1) * (2 * scale**2 + squares.sum().item()) / 18
    return 2 * unit * math.sqrt(mean_square) / scale if scale > 0 else 0.0


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


def error_limit(eager: Tensor, truth: Tensor, order: float = 0.0) -> tuple[float, float]:
    """(eager's error, what an implementation is allowed): twice that, and never less than the floor.

    order: `order_error` of these sums. 0, where nobody knows their terms, leaves the floor of rounding alone: for
    tensors of so many independent elements that eager's error is not a matter of luck.
    """
    eager_error = relative_error(eager, truth)
    return eager_error, max(ERROR_FACTOR * eager_error, torch.finfo(eager.dtype).eps / 2 + order)


def budget_rows(
    actual: Mapping[str, Tensor],
    eager: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    order: Mapping[str, float] | None = None,
) -> list[BudgetRow]:
    """A row for every tensor of `truth`.

    Args:
        actual: tensors of the implementation under test, by name.
        eager: the same computed by plain PyTorch in the same dtypes.
        truth: the same computed in fp64 from the same (already rounded) inputs.
        order: what adding in another order may cost, by name (`lora_kernels.testing.order_errors` of a call's inputs).

    Returns:
        One BudgetRow for each name, in truth's order.

    Raises:
        ValueError: a shape or dtype differs from eager's.
    """
    rows = []
    for name, exact in truth.items():
        if actual[name].dtype != eager[name].dtype:
            raise ValueError(f"{name} must have eager's dtype {eager[name].dtype}; got {actual[name].dtype}")
        eager_error, limit = error_limit(eager[name], exact, order[name] if order else 0.0)
        rows.append(BudgetRow(name, relative_error(actual[name], exact), eager_error, limit))
    return rows
