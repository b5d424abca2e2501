"""The correctness gate: a contender whose result is off gets no time printed beside it.

For y and every gradient, the error is ‖got - truth‖ / ‖truth‖ against the same operands in fp64, and the budget is
twice the error that eager PyTorch makes in the same dtype, five operations in a row, with the same dropout mask.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_kernels.benchmarking.cases import LinearCase
from lora_kernels.benchmarking.providers import SEED, CaseInputs, Provider
from lora_kernels.reference.budget import error_limit, relative_error
from lora_kernels.reference.linear import lora_linear as reference_linear


@dataclass(frozen=True)
class Verdict:
    """Outcome for one contender: the tensor that uses up most of its budget.

    Attributes:
        tensor: "y", or "d_x", "d_lora_A", "d_lora_B".
        error: its relative error against fp64.
        budget: what it was allowed.
    """

    tensor: str
    error: float
    budget: float

    @property
    def passed(self) -> bool:
        """False also where the error is NaN."""
        return self.error <= self.budget

    @property
    def reason(self) -> str:
        """One line for tables."""
        sign = "<=" if self.passed else ">"
        return f"{self.tensor}: relative error {self.error:.1e} {sign} budget {self.budget:.1e}"


class Gate:
    """The truth and the budgets of one case, made once and applied to every contender."""

    def __init__(self, case: LinearCase, inputs: CaseInputs) -> None:
        self._case, self._inputs = case, inputs
        self._expected: dict[tuple[bool, bool, float], tuple[dict[str, Tensor], dict[str, float]]] = {}

    def check(self, provider: Provider) -> Verdict:
        """Run the contender once and compare y and, in a backward case, every gradient."""
        dropout_p = self._case.dropout_p if provider.seeded_mask else 0.0
        truth, budgets = self._truth_and_budgets(provider.has_lora, provider.casts_adapters, dropout_p)
        got = evaluate(provider, self._case, self._inputs, dropout_p)
        worst = Verdict("y", math.nan, 0.0)
        for name, wanted in truth.items():
            verdict = Verdict(name, relative_error(got[name], wanted), budgets[name])
            if not verdict.passed:
                return verdict
            if math.isnan(worst.error) or verdict.error / verdict.budget > worst.error / worst.budget:
                worst = verdict
        return worst

    def _truth_and_budgets(
        self, has_lora: bool, casts_adapters: bool, dropout_p: float
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        key = (has_lora, casts_adapters, dropout_p)
        if key not in self._expected:
            with_lora = _reference_with_casts if casts_adapters else _reference
            eager = Provider("eager", with_lora if has_lora else _base, has_lora=has_lora)
            wide = _in_fp64(self._inputs)
            truth = evaluate(eager, self._case, wide, dropout_p)
            rounded = evaluate(eager, self._case, self._inputs, dropout_p)
            limits = {name: error_limit(rounded[name], exact)[1] for name, exact in truth.items()}
            self._expected[key] = (truth, limits)
        return self._expected[key]


def evaluate(provider: Provider, case: LinearCase, inputs: CaseInputs, dropout_p: float) -> dict[str, Tensor]:
    """y and the gradients of one call, by name."""
    y = provider.forward(inputs, dropout_p)
    if not case.backward:
        return {"y": y}
    leaves = inputs.leaves if provider.has_lora else {"x": inputs.x}
    gradients = torch.autograd.grad(y, tuple(leaves.values()), inputs.dy)
    return {"y": y.detach()} | {f"d_{name}": grad for name, grad in zip(leaves, gradients, strict=True)}


def _in_fp64(inputs: CaseInputs) -> CaseInputs:
    def wide(tensor: Tensor) -> Tensor:
        return tensor.detach().double().requires_grad_(tensor.requires_grad)

    return CaseInputs(
        x=wide(inputs.x),
        weight=wide(inputs.weight),
        lora_A=wide(inputs.lora_A),
        lora_B=wide(inputs.lora_B),
        bias=None if inputs.bias is None else wide(inputs.bias),
        dy=wide(inputs.dy),
        scaling=inputs.scaling,
    )


def _reference(inputs: CaseInputs, dropout_p: float) -> Tensor:
    seed = torch.tensor([SEED], dtype=torch.int64, device=inputs.x.device) if dropout_p else None
    return reference_linear(
        inputs.x,
        inputs.weight,
        inputs.lora_A,
        inputs.lora_B,
        inputs.bias,
        scaling=inputs.scaling,
        dropout_p=dropout_p,
        seed=seed,
    )


def _reference_with_casts(inputs: CaseInputs, dropout_p: float) -> Tensor:
    dtype = inputs.x.dtype
    cast = dataclasses.replace(inputs, lora_A=inputs.lora_A.to(dtype), lora_B=inputs.lora_B.to(dtype))
    return _reference(cast, dropout_p)


def _base(inputs: CaseInputs, dropout_p: float) -> Tensor:
    return torch.nn.functional.linear(inputs.x, inputs.weight, inputs.bias)
