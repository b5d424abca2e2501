"""What a call costs the host: lora_linear over the same autograd.Function doing nothing, with tensors of no size.

    python -m bench.host [--device DEVICE] [--out FOLDER]

A step of a small model, or of any model on a fast GPU, waits for Python. The control saves the same tensors through the
same kind of node, returns an empty y, and in backward empty gradients: what is left above it is validation, planning
and dispatch, and on a CPU also the products, here of 16 rows. On a GPU nothing is waited for while the clock runs.

Where no GPU is, the way through the kernels is timed, too, up to a driver that does nothing (`bench.driver`): less than
on a real one by what Triton's launcher and CUDA take of each launch, and told apart by the name.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.providers import ADDMM, AUTO, UNFUSED_CHAIN
from lora_kernels.benchmarking.cases import LinearCase
from lora_kernels.benchmarking.providers import CaseInputs
from lora_kernels.benchmarking.records import Environment, device_slug, write_csv
from lora_kernels.benchmarking.timer import Samples, round_order
from lora_kernels.ops import LINEAR
from lora_kernels.planning import Problem, make_plan
from lora_kernels.planning.device import triton_available
from lora_kernels.planning.plan import paired
from lora_kernels.planning.problem import Strategy

NOTHING = "nothing"
CALLS = 40  # between two looks at the clock; a GPU's launch queue holds about a thousand launches
ROUNDS = 40
TINY = 16  # rows, columns and rank
LAUNCHED: tuple[Strategy, ...] = ("one_pass", "shrink_fused")
NOWHERE = "launched to nowhere"
NAME_WIDTH = 50


@dataclass(frozen=True)
class HostRow:
    """One contender: microseconds of host time per forward and backward, and above the node that does nothing."""

    contender: str
    dropout_p: float
    us: float
    us_p10: float
    us_p90: float
    over_nothing_us: float
    device: str
    driver: str
    torch: str
    triton: str
    commit: str
    date: str


class Nothing(torch.autograd.Function):
    """The node of lora_linear with no work in it: the same nine inputs, the same tensors saved."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, lora_A, lora_B, _, seed, ctx.scaling, ctx.dropout_p, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        y = x.new_empty(x.shape[0], weight.shape[0])
        ctx.save_for_backward(x, weight, lora_A, lora_B, y.new_empty(x.shape[0], lora_A.shape[0]), seed)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, _, lora_A, lora_B, _, _ = ctx.saved_tensors
        gradients = torch.empty_like(x), None, torch.empty_like(lora_A), torch.empty_like(lora_B)
        return (*gradients, None, None, None, None, None)


def _nothing(inputs: CaseInputs, dropout_p: float) -> Tensor:
    i = inputs
    return Nothing.apply(i.x, i.weight, i.lora_A, i.lora_B, i.bias, None, i.scaling, dropout_p, "auto")


def measure(device: torch.device, *, rounds: int = ROUNDS, dropout_p: float = 0.0) -> list[HostRow]:
    """A row for each contender, timed in turns; without a GPU also for the kernels, launched to nowhere."""
    forwards = {
        NOTHING: _nothing,
        "lora_linear": AUTO.forward,
        UNFUSED_CHAIN.name: UNFUSED_CHAIN.forward,
        ADDMM.name: ADDMM.forward,
    }
    rows = _rows(device, "bfloat16" if device.type == "cuda" else "float32", forwards, rounds, dropout_p)
    if device.type == "cpu" and triton_available():
        rows += _launched_to_nowhere(rounds, dropout_p)
    return rows


def _launched_to_nowhere(rounds: int, dropout_p: float) -> list[HostRow]:
    """Strategies whose every product is a kernel, planned and compiled for an H200, without its driver."""
    from bench.driver import Driver

    problem = Problem(
        TINY, TINY, TINY, TINY, torch.bfloat16, torch.bfloat16, dropout_p > 0,
        arch="sm_90", device_type="cuda", sm_count=132,
    )  # fmt: skip
    planned = make_plan(problem, "triton", triton_available=True)
    rows = []
    for strategy in LAUNCHED:
        plan = paired(problem, planned, strategy)
        name = f"triton:{strategy} for {problem.arch}, {NOWHERE}"
        with Driver(lambda *_: None).active(), mock.patch.object(LINEAR, "plan_for", return_value=plan):
            found = _rows(torch.device("cpu"), "bfloat16", {NOTHING: _nothing, name: AUTO.forward}, rounds, dropout_p)
        rows += [row for row in found if row.contender == name]
    return rows


def _rows(
    device: torch.device,
    dtype: str,
    forwards: Mapping[str, Callable[[CaseInputs, float], Tensor]],
    rounds: int,
    dropout_p: float,
) -> list[HostRow]:
    case = LinearCase("host", "none", TINY, TINY, TINY, TINY, dtype=dtype, adapter_dtype=dtype, dropout_p=dropout_p)
    inputs = CaseInputs.of(case, device)
    leaves = tuple(inputs.leaves.values())

    def step(forward: Callable[[CaseInputs, float], Tensor]) -> None:
        torch.autograd.grad(forward(inputs, dropout_p), leaves, inputs.dy)

    steps = {name: partial(step, forward) for name, forward in forwards.items()}
    us: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds + 1):
        for name in round_order(list(steps), index):
            elapsed = _timed(steps[name], device)
            if index:  # the first round compiles
                us[name].append(elapsed)
    samples = Samples({name: tuple(values) for name, values in us.items()})
    environment = Environment.current(device)
    nothing = samples.time(NOTHING).median
    return [
        HostRow(
            contender=name,
            dropout_p=dropout_p,
            us=spread.median,
            us_p10=spread.p10,
            us_p90=spread.p90,
            over_nothing_us=spread.median - nothing,
            **{
                field: getattr(environment, field)
                for field in ("device", "driver", "torch", "triton", "commit", "date")
            },
        )
        for name, spread in ((name, samples.time(name)) for name in steps)
    ]


def _timed(step: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(CALLS):
        step()
    return (time.perf_counter() - start) / CALLS * 1e6


def lines(rows: Sequence[HostRow]) -> list[str]:
    """The table in the terminal."""
    head = f"{'host time, forward + backward':<{NAME_WIDTH}} {'p':>4} {'us':>8}  {'p10-p90':>16} {'over nothing':>13}"
    return [
        head,
        "-" * len(head),
        *(
            f"{r.contender:<{NAME_WIDTH}} {r.dropout_p:>4g} {r.us:>8.1f}  {f'{r.us_p10:.1f}-{r.us_p90:.1f}':>16} "
            f"{r.over_nothing_us:>13.1f}"
            for r in rows
        ),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder for host.csv (default: bench/results/local/<device>)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of all contenders (default: {ROUNDS})")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    rows = [row for p in (0.0, 0.1) for row in measure(device, rounds=arguments.rounds, dropout_p=p)]
    print("\n".join(lines(rows)))
    out = arguments.out or Path(__file__).parent / "results" / "local" / device_slug(device)
    write_csv(rows, out / "host.csv")
    print(f"written: {out / 'host.csv'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
