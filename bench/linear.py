"""One linear at a time: every contender beside the frozen linear, interleaved in one run.

    python -m bench.linear [--suite NAME] [--only WORDS] [--providers NAMES] [--total SECONDS] [--out FOLDER]

Each contender is held to fp64 before it is timed. What the time did not suffice for is said, and not replaced.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import comparison, providers, suites, targets
from bench.benchmark_json import write_benchmark_json
from bench.comparison import SideBySide
from lora_kernels.benchmarking import cases as package_cases
from lora_kernels.benchmarking.cases import LinearCase
from lora_kernels.benchmarking.load import ForeignLoad
from lora_kernels.benchmarking.providers import Provider
from lora_kernels.benchmarking.records import Environment, Record, device_slug, write_csv, write_json
from lora_kernels.benchmarking.report import by_case
from lora_kernels.benchmarking.roofline import Ceilings, measure_ceilings
from lora_kernels.benchmarking.runner import LIMIT_S, run_case
from lora_kernels.benchmarking.timer import Samples, warm_up

RESULTS = Path(__file__).parent / "results" / "local"
BUDGET_S = 1.0  # of timing per case, at least six rounds
LOSSES_SHOWN = 12


@dataclass(frozen=True)
class Run:
    """What a run found: its rows, the ceilings they are held to, and the cases it had no time for."""

    records: list[Record]
    ceilings: Ceilings
    left_out: tuple[LinearCase, ...]


def run(
    cases: Sequence[LinearCase],
    device: torch.device,
    out: Path,
    *,
    budget_s: float = BUDGET_S,
    total_s: float = math.inf,
    contenders: Callable[[LinearCase, torch.device], Sequence[Provider]] = providers.lineup,
    ceilings: Ceilings | None = None,
    rows_only: bool = False,
    in_graphs: bool = False,
) -> Run:
    """Measure, print the table while it grows, write the rows to `out` after each case, and plots at the end.

    Args:
        cases: in order of importance.
        device: where.
        out: folder for linear.csv, linear.json, run.json, linear_benchmark.json and plots.
        budget_s: seconds of timing per case.
        total_s: seconds for everything; after the first case, none is begun later than that.
        contenders: who runs in a case.
        ceilings: measured before, or None to measure them now.
        rows_only: neither linear.json, whose rows are in linear.csv, nor plots, which can be drawn from it.
        in_graphs: as `run_case` has it.

    Returns:
        All records; the caller decides what a fault in one means.
    """
    start = time.perf_counter()
    print(Environment.current(device).line)
    warm_up(device, 3.0 if device.type == "cuda" else 1.0)
    if ceilings is None:
        dtypes = list(dict.fromkeys(["float32", *(case.dtype for case in cases)]))
        ceilings = measure_ceilings(device, dtypes, budget_s=0.5)
    print(ceilings.line)
    print("Milliseconds and times the frozen linear, medians of interleaved rounds; roofline: floor over ours.\n")
    names = {provider.name for case in cases for provider in contenders(case, device) if _able(provider, case, device)}
    table = SideBySide(name for name in providers.NAMES if name in names)
    print(table.header, flush=True)
    records: list[Record] = []
    samples: dict[LinearCase, Samples] = {}
    load = ForeignLoad()
    environment = Environment.current(device)
    left_out: tuple[LinearCase, ...] = ()
    mode = ""
    for index, case in enumerate(cases):
        if records and time.perf_counter() - start >= total_s:
            left_out = tuple(cases[index:])
            break
        found = run_case(
            case, contenders(case, device), device=device, environment=environment, budget_s=budget_s,
            ceilings=ceilings, keep=samples.__setitem__, limit_s=LIMIT_S if device.type == "cpu" else None,
            in_graphs=in_graphs,
        )  # fmt: skip
        records += found
        write_csv(records, out / "linear.csv")
        write_run(Run(records, ceilings, tuple(cases[index + 1 :])), out / "run.json")
        if not rows_only:
            write_json(records, out / "linear.json")
        if case.mode != mode:
            mode = case.mode
            print(f"{mode}{', CUDA graphs' if case.graph else ''}")
        left = f"  {clock(total_s - (time.perf_counter() - start))} left" if total_s < math.inf else ""
        for shown, by_provider in by_case(found).items():
            print(table.row(shown, by_provider) + left, flush=True)
    if warning := load.warning():
        print(f"\n{warning}")
    finished = Run(records, ceilings, left_out)
    write_run(finished, out / "run.json")
    if importlib.util.find_spec("pytest_benchmark"):
        write_benchmark_json(records, samples, out / "linear_benchmark.json")
    if importlib.util.find_spec("matplotlib") and not rows_only:
        from bench import plots

        plots.linear(records, ceilings, out)
    return finished


def clock(seconds: float) -> str:
    """`2:05`; never less than nothing."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    return f"{minutes}:{rest:02}"


def _able(provider: Provider, case: LinearCase, device: torch.device) -> bool:
    return provider.why_not(case, device) is None


def write_run(found: Run, path: Path) -> None:
    """What is not a row: ceilings, and what was left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "ceilings": dataclasses.asdict(found.ceilings),
        "cases": len(by_case(found.records)),
        "left_out": [comparison.describe(case) for case in found.left_out],
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def summary(found: Run) -> list[str]:
    """The lines under the table, the bad news first: faults, what was left out, cases lost, then the targets."""
    records = found.records
    lines = [
        f"FAULT: {r.provider} on {comparison.describe(case)}: {r.status}"
        for case, by_provider in by_case(records).items()
        for r in by_provider.values()
        if r.fault
    ]
    if found.left_out:
        everything = len(found.left_out) + len(by_case(records))
        first = comparison.describe(found.left_out[0])
        lines.append(f"LEFT OUT: {len(found.left_out)} of {everything} cases, for want of time; the first is {first}")
    lines += comparison.shortened(records)
    lost = comparison.losses(records)
    lines += [
        f"slower than {loss.rival} by {loss.ratio - 1:.1%}: {comparison.describe(loss.case)}"
        for loss in lost[:LOSSES_SHOWN]
    ]
    if len(lost) > LOSSES_SHOWN:
        lines.append(f"and {len(lost) - LOSSES_SHOWN} more, see linear.csv")
    if not lost and any(True for found in by_case(records).values() for _ in comparison.rivals(found)):
        lines.append("slower than no contender in any case")
    evidence = targets.Evidence.of(records)
    for what, limit, value, verdict in targets.table(evidence):
        if value:
            lines.append(f"{verdict}: {what}: {value} (target: {limit})")
    checked = sum(r.error is not None for r in records)
    refused = sum(r.fault == "refused" for r in records)
    lines.append(f"correctness gate: {checked - refused} of {checked} within twice eager's error against fp64")
    return [*lines, *_absent(records)]


def _absent(records: Sequence[Record]) -> list[str]:
    """Contenders that ran in no case, each with its reason."""
    timed = {record.provider for record in records if record.timed}
    reasons = {r.provider: r.status for r in records if r.provider not in timed and r.status.startswith("unavailable")}
    return [f"not timed: {name}, {reason}" for name, reason in reasons.items()]


def chosen_cases(suite: str, only: str, device: torch.device) -> tuple[LinearCase, ...]:
    """The suite's cases with these words, each shape once, and without graphs where there are none."""
    cases = package_cases.select(suites.suite(suite), only)
    if device.type != "cuda":
        cases = tuple(dataclasses.replace(case, graph=False) for case in cases)
    return suites.distinct(cases)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; exit status 1 if a contender was refused or raised, whatever the speeds are."""
    parser = argparse.ArgumentParser(prog="python -m bench.linear", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--suite", choices=suites.NAMES, help="default: headline on a GPU, cpu elsewhere")
    parser.add_argument("--only", default="", help="words a case must contain, such as 'bert-base bf16 p=0'")
    parser.add_argument("--providers", default="", help=f"comma-separated, of {', '.join(providers.NAMES)}")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds of timing per case (at least 6 rounds)")
    parser.add_argument("--total", type=float, default=math.inf, help="seconds for the suite; the rest is left out")
    parser.add_argument("--out", type=Path, help="folder for rows and plots (default: bench/results/local/<device>)")
    parser.add_argument("--ceilings", type=Path, help="run.json of this device, instead of measuring them again")
    parser.add_argument("--rows-only", action="store_true", help="linear.csv and run.json, and no pictures")
    parser.add_argument(
        "--in-graphs", action="store_true", help="on a GPU also as CUDA graphs: without the host's time"
    )
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    cases = chosen_cases(arguments.suite or suites.default_suite(device), arguments.only, device)
    if not cases:
        parser.error(f"--only {arguments.only!r} matches no case")
    contenders: Callable[[LinearCase, torch.device], Sequence[Provider]] = providers.lineup
    if arguments.providers:
        try:
            chosen = providers.named(arguments.providers.split(","))
        except ValueError as error:
            parser.error(f"--{error}")
        contenders = lambda case, device: chosen  # noqa: E731 - the same line-up whatever the case
    out = arguments.out or RESULTS / device_slug(device)
    known = comparison.read_ceilings(arguments.ceilings) if arguments.ceilings and arguments.ceilings.exists() else None
    found = run(
        cases, device, out, budget_s=arguments.budget, total_s=arguments.total, contenders=contenders,
        ceilings=known, rows_only=arguments.rows_only, in_graphs=arguments.in_graphs,
    )  # fmt: skip
    print("\n" + "\n".join(summary(found)))
    print(f"written: {out}")
    return int(any(record.fault for record in found.records))


if __name__ == "__main__":
    raise SystemExit(main())
