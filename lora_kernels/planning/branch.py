"""`lora_branch`: problem → BranchPlan, by the rules and tables of `planning.plan`.

Every product of a branch has one large tensor, x [M, K] or the output's [M, N], beside the rank: all but the widest
ranks wait for memory, and a way is as good as the bytes that it moves. The two tensors may differ in dtype, so each
side has its own tiles.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from lora_kernels.planning.cost import BranchCosts
from lora_kernels.planning.measured import row_bucket
from lora_kernels.planning.plan import Plan, cpu_way, kernel_choices, ranked, servable
from lora_kernels.planning.problem import Backend, Problem, Way

LIBRARY, SHRINK_EXPAND = Way("torch", "library"), Way("triton", "shrink_expand")


@dataclass(frozen=True)
class BranchPlan:
    """What a branch will run, and why.

    Attributes:
        backend: of the forward: "torch", "triton" or "reference".
        strategy: of the forward. "library" GEMMs; "upcast" to fp32 block by block, for a CPU without 16-bit matrix
            instructions; "shrink_expand": the kernels over x and over the output; "eager".
        reason: one sentence on the forward, and one on the backward where that was chosen by itself.
        backward: backend and strategy of the backward, by the same names.
        costs: modelled microseconds of the ways that were compared for the forward, cheapest first, by their names.
        backward_costs: the same for the backward.
        x_side: precision, splits and tiles of the kernels over x and dx [M, K]; None where no kernel runs.
        out_side: the same of those over base_out, y and dy [M, N], whose dtype may be another.
    """

    backend: Backend
    strategy: str
    reason: str
    backward: Way
    costs: tuple[tuple[str, float], ...] = ()
    backward_costs: tuple[tuple[str, float], ...] = ()
    x_side: Plan | None = None
    out_side: Plan | None = None

    @property
    def backward_way(self) -> Way:
        """`backward`, as `Plan` calls it."""
        return self.backward


def make_branch_plan(problem: Problem, out_dtype: torch.dtype, backend: str, *, triton_available: bool) -> BranchPlan:
    """The plan for one problem; an explicit backend is honoured or raises, only "auto" chooses.

    Args:
        problem: sizes, x's and the adapters' dtype, and where it is to be computed.
        out_dtype: of base_out, y and dy.
        backend: "auto", "torch" or "triton".
        triton_available: whether triton can be imported.

    Raises:
        UnsupportedError: the named backend cannot serve the problem; the message says why.
    """
    problem = dataclasses.replace(problem, M=row_bucket(problem.M))
    backends, why = servable(problem, backend, (problem.dtype, out_dtype), triton_available=triton_available)
    ways = [Way("torch", cpu_way(problem)[0].strategy) if problem.device_type == "cpu" else LIBRARY]
    if "triton" in backends:
        ways = [SHRINK_EXPAND] if backend == "triton" else [*ways, SHRINK_EXPAND]
    forward = backward = ways[0]
    costs: tuple[tuple[str, float], ...] = ()
    backward_costs = costs
    reason = cpu_way(problem)[1] if problem.device_type == "cpu" and forward.backend == "torch" else ""
    x_side = out_side = None
    if "triton" in backends:
        x_side, out_side = kernel_choices(problem), kernel_choices(dataclasses.replace(problem, dtype=out_dtype))
    if len(ways) > 1:
        model = BranchCosts(problem, dataclasses.replace(problem, dtype=out_dtype))
        forward, costs, reason = ranked({way: model.forward(way) for way in ways}, measured=False)
        backward, backward_costs, backward_reason = ranked({way: model.backward(way) for way in ways}, measured=False)
        reason += f". Backward: {backward_reason}"
    return BranchPlan(
        backend=forward.backend,
        strategy=forward.strategy,
        reason="; ".join(part for part in (why, reason) if part),
        backward=backward,
        costs=costs,
        backward_costs=backward_costs,
        x_side=x_side,
        out_side=out_side,
    )
