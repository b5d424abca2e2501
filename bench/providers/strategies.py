"""This package: as `lora_linear` chooses, and each strategy by itself.

A new strategy is one line in `STRATEGY_NAMES`: its backend and its name, once the backend's implementation serves a
plan of that name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels import lora_linear
from lora_kernels.benchmarking.cases import LinearCase
from lora_kernels.benchmarking.providers import SEED, CaseInputs, Provider
from lora_kernels.errors import UnsupportedError
from lora_kernels.ops import LINEAR, Needs, problem_of
from lora_kernels.planning import Backend, Plan, Way, make_plan
from lora_kernels.planning.device import triton_available
from lora_kernels.planning.plan import paired, ways_of
from lora_kernels.planning.problem import Strategy

STRATEGY_NAMES: tuple[tuple[Backend, Strategy], ...] = (
    ("torch", "library"),
    ("torch", "upcast"),
    ("triton", "one_pass"),
    ("triton", "shrink_fused"),
    ("triton", "library"),
    ("triton", "persistent"),
)


def plan_of(case: LinearCase, device: torch.device, backend: Backend, strategy: Strategy) -> Plan:
    """The backend's plan for a case, with this strategy in place of the one it would choose.

    Raises:
        UnsupportedError: the backend, or the strategy, cannot serve the case there; the message says why.
    """
    if backend == "triton" and device.type == "cpu":
        raise UnsupportedError("needs a GPU (the interpreter checks the kernels, it does not time them)")
    problem = problem_of(
        case.M, case.N, case.K, case.R,
        dtype=case.torch_dtype, adapter_dtype=case.torch_adapter_dtype, dropout=case.dropout_p > 0, device=device,
    )  # fmt: skip
    planned = make_plan(problem, backend, triton_available=triton_available())
    if strategy == "upcast" and (device.type != "cpu" or case.dtype == "float32"):
        raise UnsupportedError("converts 16-bit operands on a CPU; there is nothing to convert here")
    if strategy == "one_pass" and "one_pass" not in dict(planned.tiles):
        raise UnsupportedError(f"has no tile for r = {case.R}")
    if Way(backend, strategy) not in ways_of(problem, "forward", (backend,)):
        raise UnsupportedError("does not serve this problem: see ways_of in planning/plan.py")
    return paired(problem, planned, strategy)


class StrategyFunction(torch.autograd.Function):
    """forward(x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p, plan) -> y, as the plan says."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, lora_A, lora_B, _, seed, ctx.scaling, ctx.dropout_p, ctx.plan = inputs
        y, xa = LINEAR.implementation(ctx.plan.backend).forward(*inputs)
        ctx.save_for_backward(x, weight, lora_A, lora_B, xa, seed)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, xa, seed = ctx.saved_tensors
        gradients = LINEAR.implementation(ctx.plan.backward_way.backend).backward(
            dy, x, weight, lora_A, lora_B, xa, seed, ctx.scaling, ctx.dropout_p, Needs(*ctx.needs_input_grad[:5]),
            ctx.plan,
        )  # fmt: skip
        return (*gradients, None, None, None, None)


def strategy_provider(backend: Backend, strategy: Strategy) -> Provider:
    """One strategy as a contender, `backend:strategy`."""

    def forward(inputs: CaseInputs, dropout_p: float) -> Tensor:
        i = inputs
        plan = i.build(
            (backend, strategy, dropout_p),
            lambda: plan_of(_case(i, dropout_p), i.x.device, backend, strategy),
        )
        seed = None
        if dropout_p:
            seed = i.build("seed", lambda: torch.full((1,), SEED, dtype=torch.int64, device=i.x.device))
        return StrategyFunction.apply(i.x, i.weight, i.lora_A, i.lora_B, i.bias, seed, i.scaling, dropout_p, plan)

    def why_not(case: LinearCase, device: torch.device) -> str | None:
        try:
            plan_of(case, device, backend, strategy)
        except UnsupportedError as error:
            return str(error)
        return None

    return Provider(f"{backend}:{strategy}", forward, seeded_mask=True, why_not=why_not)


def _case(inputs: CaseInputs, dropout_p: float) -> LinearCase:
    (m, k), n, r = inputs.x.shape, inputs.weight.shape[0], inputs.lora_A.shape[0]
    dtype, adapter_dtype = (str(t.dtype).removeprefix("torch.") for t in (inputs.x, inputs.lora_A))
    return LinearCase("", "", m, n, k, r, dtype=dtype, adapter_dtype=adapter_dtype, dropout_p=dropout_p)


def _auto(inputs: CaseInputs, dropout_p: float) -> Tensor:
    i = inputs
    return lora_linear(
        i.x, i.weight, i.lora_A, i.lora_B, i.bias,
        scaling=i.scaling, dropout_p=dropout_p, dropout_seed=SEED if dropout_p else None,
    )  # fmt: skip


AUTO = Provider("auto", _auto, seeded_mask=True)
STRATEGIES = tuple(strategy_provider(backend, strategy) for backend, strategy in STRATEGY_NAMES)
