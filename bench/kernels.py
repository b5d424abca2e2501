"""Each kernel alone, over tiles: microseconds, beside the library's product of the same operands and the floor.

    python -m bench.kernels [--only WORDS] [--budget SECONDS] [--total SECONDS] [--out FOLDER] [--list]

What a plan composes is timed one kernel at a time here, so that a table of tiles and a model of costs can be set from
it. Each group is one problem: contenders take turns, and what the library or a copy takes for the same operands, or the
same bytes, runs among them. One result of each contender is held to fp32 before it is timed. `--list` needs no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.kernel_groups import NOT_OURS, Call, Group, groups
from lora_kernels.benchmarking.records import Environment, device_slug, write_csv
from lora_kernels.benchmarking.timer import interleave, warm_up

LIMITS = {torch.bfloat16: 2.0**-6, torch.float32: 2.0**-18}
"""Of the relative error of what is timed, by its dtype: three roundings to bf16 are 2^-7.4 at most; the truth is the
library's fp32, whose own error is some 2^-20."""


@dataclass(frozen=True)
class KernelRow:
    """One contender of one group."""

    group: str
    contender: str
    status: str
    us: float | None
    us_p10: float | None
    us_p90: float | None
    over_first: float | None
    floor_us: float
    error: float | None
    device: str
    driver: str
    torch: str
    triton: str
    commit: str
    date: str


def measure(group: Group, device: torch.device, *, budget_s: float) -> list[KernelRow]:
    """A row for each contender: times only of what is right."""
    calls, truth = group.build(device)
    expected = truth().double()
    environment = Environment.current(device)
    status, errors, fit = dict.fromkeys(calls, "ok"), dict[str, float](), dict[str, Call]()
    for name, call in calls.items():
        try:
            got = call()
            torch.cuda.synchronize(device)
        except Exception as error:  # one contender's fault is a row
            status[name] = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
            continue
        errors[name] = ((got.double() - expected).norm() / expected.norm()).item()
        if not name.startswith(NOT_OURS) and not errors[name] <= LIMITS[got.dtype]:
            status[name] = f"refused: error {errors[name]:.1e}"
            continue
        fit[name] = call
    del expected
    samples = interleave(fit, device=device, budget_s=budget_s, warmup=2)
    first = next(iter(fit))
    rows = []
    for name in calls:
        time_us = samples.time(name) if name in fit else None
        rows.append(
            KernelRow(
                group=group.name,
                contender=name,
                status=status[name],
                us=1e3 * time_us.median if time_us else None,
                us_p10=1e3 * time_us.p10 if time_us else None,
                us_p90=1e3 * time_us.p90 if time_us else None,
                over_first=samples.ratio(name, first).median if time_us else None,
                floor_us=group.floor_us,
                error=errors.get(name),
                **{
                    field: getattr(environment, field)
                    for field in ("device", "driver", "torch", "triton", "commit", "date")
                },
            )
        )
    return rows


def warm(index: int) -> str:
    """Runs each contender of one group once, which compiles; nothing is compared."""
    device = torch.device("cuda")
    calls, _ = groups()[index].build(device)
    for call in calls.values():
        with contextlib.suppress(Exception):  # it fails again where it is measured, and is said there
            call()
            torch.cuda.synchronize()
    return ""


def in_processes(function: Callable[[int], str], indices: Sequence[int], workers: int) -> Iterator[str]:
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=4) as pool:
        yield from pool.imap_unordered(function, indices)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="groups whose name contains one of these, separated by commas")
    parser.add_argument("--budget", type=float, default=0.6, help="seconds of timing per group (at least 6 rounds)")
    parser.add_argument("--total", type=float, default=300.0, help="no group is begun after so many seconds")
    parser.add_argument("--out", type=Path, help="folder for kernels.csv (default: bench/results/local/<device>)")
    parser.add_argument("--list", action="store_true", help="print what would run")
    arguments = parser.parse_args(argv)
    found = groups()
    wanted = [
        index
        for index, group in enumerate(found)
        if not arguments.only or any(words in group.name for words in arguments.only.split(","))
    ]
    workers = min(14, os.cpu_count() or 1)
    if arguments.list:
        for index in wanted:
            calls, _ = found[index].build(torch.device("cpu"))
            print(f"{found[index].name}: {len(calls)} contenders")
        return int(not wanted)
    if not torch.cuda.is_available():
        print("bench.kernels needs a GPU that torch can use, and there is none here; --list needs none")
        return 3
    start = time.perf_counter()
    for _ in in_processes(warm, wanted, workers):
        pass
    device = torch.device("cuda")
    print(Environment.current(device).line)
    print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    warm_up(device, 2.0)
    out = arguments.out or Path(__file__).parent / "results" / "local" / device_slug(device)
    rows: list[KernelRow] = []
    for index in wanted:
        if time.perf_counter() - start > arguments.total:
            print(f"LEFT OUT for want of time: {found[index].name}")
            continue
        group_rows = measure(found[index], device, budget_s=arguments.budget)
        rows += group_rows
        write_csv(rows, out / "kernels.csv")
        print(f"\n{found[index].name}  (floor {found[index].floor_us:.1f} us)")
        for row in sorted(group_rows, key=lambda row: row.us or 1e9):
            times = (
                f"{row.us:9.1f} us ({row.us_p10:.1f}-{row.us_p90:.1f}) x{row.over_first:.3f}" if row.us else row.status
            )
            print(f"  {row.contender:<44} {times}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
