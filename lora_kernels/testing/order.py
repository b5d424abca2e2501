"""The floor of the error budget for a call of ours: what adding its sums in another order may cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_kernels.reference.budget import order_error
from lora_kernels.reference.philox import dropout_scale
from lora_kernels.testing.branch import BranchInputs, run_branch
from lora_kernels.testing.linear import LinearInputs, run_linear


def order_errors(truth: Mapping[str, Tensor], *problems: LinearInputs | BranchInputs) -> dict[str, float]:
    """`reference.budget.order_error` of y and every gradient, by name, for `budget_rows`.

    Args:
        truth: what `run_linear` or `run_branch` returns for the problem in fp64; for several problems their tensors
            end to end, flattened.
        *problems: the inputs, all of one size.
    """
    squares = [_squared(problem) for problem in problems]
    (n, r), k = problems[0].lora_B.shape, problems[0].lora_A.shape[1]
    m = problems[0].x.numel() // k
    # Of the longest chain of two sums: through xa, K terms, and through dyb, N; base and bias are one each.
    terms = {
        "y": k + r + 2, "d_x": n + r + 1, "d_weight": m, "d_lora_A": n + m, "d_lora_B": k + m, "d_bias": m,
        "d_base_out": 1,
    }  # fmt: skip
    return {
        name: order_error(exact, torch.cat([q[name].flatten() for q in squares]), terms[name], problems[0].x.dtype)
        for name, exact in truth.items()
    }


def _squared(problem: LinearInputs | BranchInputs) -> dict[str, Tensor]:
    """Every sum of the call with each of its terms squared: the same products of squared factors, in fp64."""
    factors: dict[str, Any] = {name: t.square() for name, t in vars(problem.double()).items() if isinstance(t, Tensor)}
    scaling = problem.scaling**2 * dropout_scale(problem.dropout_p)  # of 1 / (1 - p) squared, the specification has one
    squared = replace(problem, **factors | {"scaling": scaling})
    return run_linear(squared, "reference") if isinstance(squared, LinearInputs) else run_branch(squared, "reference")
