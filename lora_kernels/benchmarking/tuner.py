"""Tuning: for each problem and direction, every way that can serve it is checked against fp64, then timed in turns.

What is kept is what the planner asks for: the median of each way, with the tile that was fastest for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lora_kernels import ops
from lora_kernels.benchmarking.cases import LinearCase
from lora_kernels.benchmarking.providers import SEED, CaseInputs
from lora_kernels.benchmarking.timer import interleave
from lora_kernels.planning import Backend, Plan, Problem, Way, make_plan, tiles
from lora_kernels.planning.device import triton_available
from lora_kernels.planning.measured import Direction, Key, Timing, row_bucket
from lora_kernels.planning.plan import ways_of
from lora_kernels.planning.problem import DIRECTIONS, obstacle_to_triton
from lora_kernels.reference import linear as reference
from lora_kernels.reference.budget import error_limit, relative_error

MAIN_KERNEL = {
    "shrink_fused": "gemm_expand",
    "fused": "gemm_expand",
    "one_pass": "one_pass",
    "persistent": "persistent",
}
"""The kernel of each strategy whose tile is worth trying others for."""
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Question:
    """What is tuned: one problem, at its row bucket, in one direction."""

    case: LinearCase
    direction: Direction

    @property
    def line(self) -> str:
        """For progress and tables."""
        c = self.case
        return f"{self.direction:<8} {c.M} x {c.N} x {c.K}  r = {c.R}  {c.dtypes}  p = {c.dropout_p:g}"


@dataclass(frozen=True)
class Outcome:
    """What came out: the times that are kept, and why other ways have none."""

    question: Question
    key: Key
    timings: dict[str, Timing]
    refused: dict[str, str]


class DeviceLostError(RuntimeError):
    """A kernel faulted so that the process can launch no other."""


def questions(cases: Iterable[LinearCase]) -> list[Question]:
    """The distinct problems behind the cases, at their row buckets; forward cases ask for the forward only."""
    found: dict[Question, None] = {}
    for case in cases:
        plain = dataclasses.replace(case, name="", model="", M=row_bucket(case.M), mode="forward+backward", bias=False)
        for direction in DIRECTIONS:
            if direction == "forward" or case.backward:
                found[Question(plain, direction)] = None
    return list(found)


def tune(question: Question, device: torch.device, *, budget_s: float) -> Outcome:
    """Time every way of one question, those first that the planner would take.

    Args:
        question: what is asked.
        device: where.
        budget_s: seconds for the timed rounds; compiling and checking come on top.

    Raises:
        torch.OutOfMemoryError: the operands alone do not fit.
        DeviceLostError: a kernel left the device unusable for this process.
    """
    case, direction = question.case, question.direction
    problem = ops.problem_of(
        case.M, case.N, case.K, case.R,
        dtype=case.torch_dtype, adapter_dtype=case.torch_adapter_dtype, dropout=case.dropout_p > 0, device=device,
    )  # fmt: skip
    inputs = CaseInputs.of(case, device)
    run = _Runner(case, inputs, direction)
    truth, limits = run.truth_and_limits()
    refused: dict[str, str] = {}
    contenders: dict[str, tuple[_Candidate, Callable[[], object]]] = {}
    for candidate in _candidates(problem, direction):
        call = partial(run, candidate.plan)
        try:
            got = call()
            off = [name for name, limit in limits.items() if not relative_error(got[name], truth[name]) <= limit]
        except Exception as error:  # a tile that does not fit this GPU is a fact to keep, not the end
            lines = str(error).strip().splitlines() or [""]
            refused[candidate.name] = f"{type(error).__name__}: {lines[0]}"
            _probe(device, candidate.name)
            continue
        if off:
            refused[candidate.name] = f"{off[0]} is off by more than twice eager's error"
        else:
            contenders[candidate.name] = candidate, call
    del truth
    timings: dict[str, Timing] = {}
    if contenders:
        calls = {name: call for name, (_, call) in contenders.items()}
        samples = interleave(calls, device=device, budget_s=budget_s, warmup=2)
        for name, (candidate, _) in contenders.items():
            us, way = 1e3 * samples.time(name).median, str(candidate.way)
            if way not in timings or us < timings[way].us:
                timings[way] = Timing(us, candidate.tiles)
    return Outcome(question, problem.key(direction), timings, refused)


def _probe(device: torch.device, after: str) -> None:
    """An illegal access is reported by every later call as well: those would be refused for this one's fault."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise DeviceLostError(f"{after} left the device unusable for this process: {error}") from error


@dataclass(frozen=True)
class _Candidate:
    """A way, with one of its main kernel's tiles where it has one."""

    way: Way
    plan: Plan
    tiles: tuple[tuple[str, tiles.Tile], ...] = ()

    @property
    def name(self) -> str:
        blocks = [
            f"{t.block_m}x{t.block_n}x{t.block_k}, {t.num_warps} warps, {t.num_stages} stages" for _, t in self.tiles
        ]
        return " ".join([str(self.way), *blocks])


def _candidates(problem: Problem, direction: Direction) -> Iterator[_Candidate]:
    """Every way with its planned tile and each other tile that is shipped for its main kernel."""
    obstacle = obstacle_to_triton(
        problem.dtype, problem.arch, problem.device_type,
        interpreted=problem.interpreted, triton_available=triton_available(),
    )  # fmt: skip
    kernels = obstacle is None and not problem.interpreted
    base = make_plan(problem, "triton" if kernels else "torch", triton_available=triton_available())
    backends: tuple[Backend, ...] = ("torch", "triton") if kernels else ("torch",)
    for way in ways_of(problem, direction, backends):
        if direction == "forward":
            plan = dataclasses.replace(base, backend=way.backend, strategy=way.strategy)
        else:
            plan = dataclasses.replace(base, backward=way)
        kernel = MAIN_KERNEL.get(way.strategy)
        if kernel == "gemm_expand":
            masked = problem.dropout and direction == "backward"
            kernel += ("_tma" if plan.use_tma else "") + ("_dropout" if masked else "")
        if kernel is None:
            yield _Candidate(way, plan)
            continue
        planned = plan.tile(kernel, backward=direction == "backward")
        for tile in (planned, *tiles.variants(problem.family, problem.width, kernel, rows=problem.M, rank=problem.R)):
            if tile is not planned and tile == planned:
                continue
            name = kernel if direction == "forward" else f"backward.{kernel}"
            yield _Candidate(way, dataclasses.replace(plan, tiles=(*plan.tiles, (name, tile))), ((kernel, tile),))


class _Runner:
    """One direction of one case, under any plan."""

    def __init__(self, case: LinearCase, inputs: CaseInputs, direction: Direction) -> None:
        self._inputs = dataclasses.replace(
            inputs, x=inputs.x.detach(), lora_A=inputs.lora_A.detach(), lora_B=inputs.lora_B.detach()
        )
        self._p, self._backward = case.dropout_p, direction == "backward"
        device = inputs.x.device
        self._seed = torch.tensor([SEED], device=device) if self._p else None
        self._xa = self._forward(None)[1] if self._backward else None

    def _forward(self, plan: Plan | None) -> tuple[Tensor, Tensor]:
        i = self._inputs
        plan = plan or Plan("torch", "library", "only xa is wanted")
        forward = ops.LINEAR.implementation(plan.backend).forward
        return forward(i.x, i.weight, i.lora_A, i.lora_B, i.bias, self._seed, i.scaling, self._p, plan)

    def __call__(self, plan: Plan) -> Outputs:
        if not self._backward:
            return {"y": self._forward(plan)[0]}
        i = self._inputs
        backward = ops.LINEAR.implementation(plan.backward_way.backend).backward
        needs = ops.Needs(x=True, weight=False, lora_A=True, lora_B=True, bias=False)
        dx, _, d_lora_A, d_lora_B, _ = backward(
            i.dy, i.x, i.weight, i.lora_A, i.lora_B, self._xa, self._seed, i.scaling, self._p, needs, plan
        )
        assert dx is not None and d_lora_A is not None and d_lora_B is not None
        return {"d_x": dx, "d_lora_A": d_lora_A, "d_lora_B": d_lora_B}

    def truth_and_limits(self) -> tuple[Outputs, dict[str, float]]:
        """The reference in fp64, and twice the error that it makes in the case's own dtypes."""
        truth = self._reference(torch.float64)
        eager = self._reference(None)
        return truth, {name: error_limit(eager[name], exact)[1] for name, exact in truth.items()}

    def _reference(self, dtype: torch.dtype | None) -> Outputs:
        i = self._inputs
        leaves = {name: getattr(i, name).to(dtype or getattr(i, name).dtype) for name in ("x", "lora_A", "lora_B")}
        leaves = {name: leaf.detach().requires_grad_(self._backward) for name, leaf in leaves.items()}
        y = reference.lora_linear(
            leaves["x"], i.weight.to(leaves["x"].dtype), leaves["lora_A"], leaves["lora_B"], None,
            scaling=i.scaling, dropout_p=self._p, seed=self._seed,
        )  # fmt: skip
        if not self._backward:
            return {"y": y}
        gradients = torch.autograd.grad(y, tuple(leaves.values()), i.dy.to(y.dtype))
        return {f"d_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
