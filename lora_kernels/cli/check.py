"""`lora-kernels check`: every backend that this machine can serve, against fp64.

What a user runs on a new GPU. For each device, backend and strategy, in fp32, bf16 and
fp16 (interpreted or `--quick`: not fp16): y and every gradient within the error budget (`reference.budget`), no value
read from unwritten memory, from kernels the same bits from run to run (a library's are the library's affair), and the
dropout masks of forward and backward equal to the specification's, bit by bit. Rows of the strategy `branch` are
`lora_branch` as the backend plans it; the others are `lora_linear`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_kernels import config
from lora_kernels.cli import table
from lora_kernels.cli.devices import device_of
from lora_kernels.errors import UnsupportedError
from lora_kernels.ops import problem_of
from lora_kernels.planning import Plan, make_plan
from lora_kernels.planning.device import device_traits, triton_available
from lora_kernels.planning.plan import paired, ways_of
from lora_kernels.planning.problem import Strategy, obstacle_to_triton
from lora_kernels.reference.philox import keep_mask
from lora_kernels.testing import (
    BranchInputs,
    LinearInputs,
    budget_rows,
    make_branch_inputs,
    make_linear_inputs,
    order_errors,
    poisoned_allocation,
    run_branch,
    run_linear,
    run_linear_plan,
)

BACKENDS = ("torch", "triton")


@dataclass(frozen=True)
class Case:
    """One problem. strided: every operand transposed in memory, and dy's rows overlapping."""

    name: str
    M: int
    N: int
    K: int
    R: int
    bias: bool = True
    dropout_p: float = 0.0
    strided: bool = False

    @property
    def aligned(self) -> bool:
        """Whether tensor descriptors can serve it: 16-byte rows in every dtype."""
        return not self.strided and self.N % 8 == 0 and self.K % 8 == 0


# No tensor here has only a few elements: its error would be a handful of roundings, and eager's may happen to be none.
CASES = (
    Case("even", 128, 128, 192, 16),
    Case("prime", 61, 83, 139, 7, bias=False),
    Case("dropout", 70, 88, 144, 16, dropout_p=0.25),
    Case("M = 1", 1, 96, 160, 32),
    Case("N = 1", 64, 1, 96, 32, bias=False),
    Case("K = 1", 64, 96, 1, 32),
    Case("wide rank", 40, 72, 104, 200),
    Case("tall", 300, 40, 48, 1, bias=False),
    Case("strided", 45, 70, 90, 5, strided=True),
    Case("strided, dropout", 37, 51, 141, 3, dropout_p=0.5, strided=True),
)
QUICK = CASES[:3]
# Large enough for several tiles in every direction, on a device that does not mind.
LARGE = (
    Case("large", 1024, 1536, 2048, 16),
    Case("large, odd", 1021, 1531, 2039, 33, bias=False),
    Case("large, dropout", 1024, 1536, 2048, 64, dropout_p=0.1),
)

# (x, adapters)
DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
)
QUICK_DTYPES = DTYPES[:3]
# What lora_branch has besides: a base that answers in another dtype, as a quantised one may under autocast.
BRANCH_DTYPES = (
    *((x, adapters, x) for x, adapters in DTYPES),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float32, torch.float32, torch.bfloat16),
)
BRANCH = "branch"

MASK_CASE = Case("mask", 101, 101, 101, 101, bias=False, dropout_p=0.3)
MASK_SEED = 0x0123_4567_89AB_CDEF  # both halves of the key are in use
MASK_OFFSET = (2**31 - 9, 24)


@dataclass(frozen=True)
class Row:
    """One line of the table: the tensor that uses up most of its budget, or what went wrong."""

    device: str
    backend: str
    strategy: str
    dtype: str
    case: str
    tensor: str
    error: float
    eager_error: float
    limit: float
    ok: bool
    note: str = ""


def add_parser(commands: Any) -> None:
    """Declares the command."""
    parser = commands.add_parser("check", help="every backend on this machine against fp64; exit status 1 on a failure")
    parser.add_argument("--backend", choices=BACKENDS, help="only this one (default: all that can run here)")
    parser.add_argument("--device", help="only this one (default: the CPU, and the current GPU if there is one)")
    parser.add_argument("--quick", action="store_true", help="three problems in three dtypes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the table; 1 if any row failed."""
    places = [arguments.device] if arguments.device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    skipped: list[str] = []
    jobs: list[Job] = []
    for place in places:
        device = device_of(place)
        for backend in [arguments.backend] if arguments.backend else BACKENDS:
            obstacle = _obstacle(backend, device)
            if obstacle:
                skipped.append(f"{backend} on {place}: {obstacle}")
            else:
                jobs += plan_jobs(backend, device, quick=arguments.quick)
    if not jobs:
        raise UnsupportedError("nothing to check. " + "; ".join(skipped))

    rows = []
    if not arguments.json:
        print(_HEADER)
    for row in _with_progress(run_jobs(jobs), len(jobs)):
        rows.append(row)
        if not arguments.json:
            print(_line(row))
    failed = [row for row in rows if not row.ok]
    if arguments.json:
        # A row that failed may hold NaN or Inf, which JSON has no word for.
        found = [{k: _finite(v) for k, v in dataclasses.asdict(row).items()} for row in rows]
        print(json.dumps({"rows": found, "skipped": skipped, "failed": len(failed)}, indent=1))
    else:
        for reason in skipped:
            print(f"not checked: {reason}")
        print(f"{len(rows) - len(failed)} of {len(rows)} checks passed")
    for row in failed:
        print(f"FAILED {_identity(row)}: {_fault(row)}", file=sys.stderr)
    return int(bool(failed))


def _obstacle(backend: str, device: torch.device) -> str | None:
    if backend == "torch":
        return None
    arch = device_traits(device.type, device.index).arch
    return obstacle_to_triton(
        torch.float32, arch, device.type, interpreted=config.INTERPRETED, triton_available=triton_available()
    )


# -- what is run -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One line to be: a case in one pair of dtypes under a plan of a backend; None: the plan that the operation makes.

    out_dtype: base_out's, for a job of lora_branch; None: one of lora_linear.
    """

    device: torch.device
    backend: str
    strategy: str
    plan: Plan | None
    case: Case
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    out_dtype: torch.dtype | None = None

    @property
    def dtypes(self) -> str:
        """`bf16`, or `bf16+fp32` where the adapters have their own dtype; `bf16>fp32`: so does the output."""
        names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        own = self.adapter_dtype != self.dtype
        inputs = f"{names[self.dtype]}+{names[self.adapter_dtype]}" if own else names[self.dtype]
        return inputs if self.out_dtype in (None, self.dtype) else f"{inputs}>{names[self.out_dtype]}"


def plan_jobs(backend: str, device: torch.device, *, quick: bool) -> list[Job]:
    """Every case in every dtype with every strategy of the backend, also those the planner would not choose here."""
    cases: tuple[Case, ...] = QUICK if quick else CASES
    dtypes = QUICK_DTYPES if quick or (backend == "triton" and config.INTERPRETED) else DTYPES
    if device.type == "cuda" and not quick:
        cases += LARGE
    linear = [
        Job(device, backend, strategy, plan, case, dtype, adapter_dtype)
        for dtype, adapter_dtype in dtypes
        for case in (*cases, MASK_CASE)
        for strategy, plan in _plans(backend, device, case, dtype, adapter_dtype)
    ]
    branch = [
        Job(device, backend, BRANCH, None, case, dtype, adapter_dtype, out_dtype)
        for dtype, adapter_dtype, out_dtype in BRANCH_DTYPES
        if (dtype, adapter_dtype) in dtypes
        for case in (*cases, MASK_CASE)
    ]
    return linear + branch


def _plans(
    backend: str, device: torch.device, case: Case, dtype: torch.dtype, adapter_dtype: torch.dtype
) -> Iterator[tuple[str, Plan | None]]:
    problem = problem_of(
        case.M, case.N, case.K, case.R,
        dtype=dtype, adapter_dtype=adapter_dtype, dropout=case.dropout_p > 0, device=device,
    )  # fmt: skip
    planned = make_plan(problem, backend, triton_available=triton_available())

    def name(plan: Plan) -> str:
        # Operands that descriptors cannot serve go through the pointer kernel, whatever the plan allows.
        descriptors = plan.use_tma and case.aligned and plan.backward_way.strategy == "fused"
        return f"{plan.strategy}, TMA" if descriptors else plan.strategy

    strategies: list[Strategy] = []
    if backend == "triton":
        # one_pass is right for any number of rows, though it is fast, and planned, for few.
        strategies = [way.strategy for way in ways_of(problem, "forward", ("triton",))]
        if "one_pass" in dict(planned.tiles) and "one_pass" not in strategies:
            strategies.append("one_pass")
    elif device.type == "cpu" and dtype != torch.float32:
        strategies = ["library", "upcast"]
    descriptors = (True, False) if planned.use_tma else (False,)
    variants = [dataclasses.replace(paired(problem, planned, s), use_tma=t) for s in strategies for t in descriptors]
    seen: set[str] = set()
    for plan in (planned, *variants):
        if name(plan) not in seen:
            seen.add(name(plan))
            yield name(plan), None if plan is planned else plan


def run_jobs(jobs: Sequence[Job]) -> Iterator[Row]:
    """A row for each job; an exception is a failed row, so that one kernel that does not compile hides no other."""
    budgets: dict[Any, tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]] = {}
    for job in jobs:
        try:
            if job.case is MASK_CASE:
                yield _check_masks(job)
                continue
            inputs = _inputs(job)
            key = (job.device, job.case, job.dtype, job.adapter_dtype, job.out_dtype)
            if key not in budgets:
                budgets.clear()  # jobs of one problem follow one another
                truth = _run(inputs.double(), "reference")
                budgets[key] = truth, _on_cpu(_run(inputs, "reference")), order_errors(truth, inputs)
            yield _check_numbers(job, inputs, *budgets[key])
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            yield _row(job, "", math.inf, math.nan, math.nan, f"{type(error).__name__}: {lines[0]}")


Inputs = LinearInputs | BranchInputs


def _inputs(job: Job) -> Inputs:
    case = job.case
    sizes = (case.M, case.N, case.K, case.R)
    inputs: Inputs
    if job.out_dtype is None:
        inputs = make_linear_inputs(
            *sizes, dtype=job.dtype, adapter_dtype=job.adapter_dtype, bias=case.bias, dropout_p=case.dropout_p,
            device=job.device, seed=7,
        )  # fmt: skip
    else:
        inputs = make_branch_inputs(
            *sizes, dtype=job.dtype, adapter_dtype=job.adapter_dtype, out_dtype=job.out_dtype,
            dropout_p=case.dropout_p, device=job.device, seed=7,
        )  # fmt: skip
    if not case.strided:
        return inputs
    transposed: dict[str, Any] = {
        name: t.T.contiguous().T
        for name, t in vars(inputs).items()
        if isinstance(t, Tensor) and t.dim() == 2 and name != "dy"
    }
    dy = inputs.dy.flatten().unfold(0, case.N, 1)[: case.M]  # dy[m, n] = values[m + n]
    return dataclasses.replace(inputs, dy=dy, **transposed)


def _run(inputs: Inputs, backend: str) -> dict[str, Tensor]:
    """y and every gradient by name, through the public operation."""
    return run_linear(inputs, backend) if isinstance(inputs, LinearInputs) else run_branch(inputs, backend)


def _call(job: Job) -> Callable[[Any], dict[str, Tensor]]:
    """The same for a job: through the operation, or through the backend for a plan of another kind."""
    plan = job.plan
    if plan is None:
        return lambda inputs: _run(inputs, job.backend)
    return lambda inputs: run_linear_plan(inputs, plan)


# -- how it is judged ------------------------------------------------------------------------------------------


def _check_numbers(
    job: Job, inputs: Inputs, truth: dict[str, Tensor], eager: dict[str, Tensor], order: dict[str, float]
) -> Row:
    call = _call(job)
    with poisoned_allocation():
        actual, *others = [call(inputs) for _ in range(_runs(job.backend))]
    if actual.keys() != truth.keys():
        return _row(job, "", math.inf, math.nan, math.nan, f"returned {sorted(actual)}, not {sorted(truth)}")
    found = budget_rows(_on_cpu(actual), eager, truth, order)
    worst = max(found, key=lambda row: math.inf if math.isnan(row.error) else row.error / row.limit)
    unequal = [name for name in actual if not all(torch.equal(actual[name], other[name]) for other in others)]
    note = f"another run gave other bits in {', '.join(unequal)}" if unequal and worst.ok else ""
    return _row(job, *worst, note)


def _runs(backend: str) -> int:
    """Kernels are launched as written, then recorded, then repeated: each way once, for the same bits.

    Interpreted, which is one thread, in order, another run would be for nothing; of a library's GEMM no bits are
    promised.
    """
    return 3 if backend == "triton" and not config.INTERPRETED else 1


def _check_masks(job: Job) -> Row:
    """Makes the masks visible: with a base of 0, A = B = I, x = 1, s * mask is y, dx for dy = 1, dA for dy = I."""
    inputs, size = _inputs(job), job.case.M
    wide, narrow = {"dtype": job.dtype, "device": job.device}, {"dtype": job.adapter_dtype, "device": job.device}
    ones = torch.ones(size, size, **wide)  # type: ignore[call-overload]
    base = "weight" if isinstance(inputs, LinearInputs) else "base_out"
    zero: dict[str, Any] = {base: torch.zeros_like(getattr(inputs, base))}
    probe = dataclasses.replace(
        inputs,
        x=ones,
        **zero,
        lora_A=torch.eye(size, **narrow),  # type: ignore[call-overload]
        lora_B=torch.eye(size, **narrow),  # type: ignore[call-overload]
        dy=torch.ones_like(inputs.dy),
        dropout_seed=MASK_SEED,
    )
    call, wrong, bits = _call(job), {}, size * size
    for part, offset in (("", None), (" of a shard", MASK_OFFSET)):
        probe = dataclasses.replace(probe, dropout_offset=offset)
        with poisoned_allocation():
            spread = call(probe)
            single = call(dataclasses.replace(probe, dy=torch.eye(size).to(inputs.dy)))
        expected = keep_mask(torch.tensor([MASK_SEED, *(offset or ())]), size, size, job.case.dropout_p)
        for name, shown in (("y", spread["y"]), ("d_x", spread["d_x"]), ("d_lora_A", single["d_lora_A"])):
            wrong[name + part] = int(((shown.cpu() != 0) != expected).sum())
    worst = max(wrong, key=lambda name: wrong[name])
    if not wrong[worst]:
        return _row(job, "all", 0.0, 0.0, 0.0)
    note = f"{wrong[worst]} of {bits} mask bits in {worst} differ from the specification's"
    return _row(job, worst, wrong[worst] / bits, 0.0, 0.0, note)


def _row(job: Job, tensor: str, error: float, eager_error: float, limit: float, note: str = "") -> Row:
    return Row(
        device=str(job.device),
        backend=job.backend,
        strategy=job.strategy,
        dtype=job.dtypes,
        case=job.case.name,
        tensor=tensor,
        error=error,
        eager_error=eager_error,
        limit=limit,
        ok=error <= limit and not note,
        note=note,
    )


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -- how it is shown -------------------------------------------------------------------------------------------

_COLUMNS = (6, 7, 17, 14, 16, 10, 7, 7, 7, 0)
_HEADER = table.line(
    ("device", "backend", "strategy", "dtypes", "case", "worst", "error", "eager", "limit", ""), _COLUMNS
)


def _line(row: Row) -> str:
    numbers = [f"{value:.1e}" for value in (row.error, row.eager_error, row.limit)]
    if row.case == MASK_CASE.name and row.ok:
        numbers = ["equal", "-", "-"]
    verdict = "ok" if row.ok else "FAILED" + (f": {row.note}" if row.note else "")
    cells = (row.device, row.backend, row.strategy, row.dtype, row.case, row.tensor, *numbers, verdict)
    return table.line(cells, _COLUMNS)


def _identity(row: Row) -> str:
    return f"{row.backend} ({row.strategy}) on {row.device}, {row.dtype}, {row.case}"


def _fault(row: Row) -> str:
    return row.note or f"{row.tensor} is off by {row.error:.1e}, the budget is {row.limit:.1e}"


def _with_progress(rows: Iterator[Row], total: int) -> Iterator[Row]:
    """Counts on stderr while somebody watches it."""
    watched = sys.stderr.isatty()
    for done, row in enumerate(rows, start=1):
        if watched:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        yield row
        if watched and done < total:
            print(f"\r{done} of {total}", end="", file=sys.stderr, flush=True)
