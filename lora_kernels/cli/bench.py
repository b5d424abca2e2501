"""`lora-kernels bench`: the frozen linear, the unfused chain and every backend side by side, on this machine."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_kernels.cli.devices import device_of
from lora_kernels.errors import ArgumentError

if TYPE_CHECKING:
    from lora_kernels.benchmarking.cases import LinearCase
    from lora_kernels.benchmarking.records import Record

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def add_parser(commands: Any) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "bench",
        help="frozen, unfused and fused on this machine: table, CSV, plot",
        description="Every contender is checked against fp64 before it is timed; all of them run in every round.",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of x, weight and adapters (default: the suite's)")
    parser.add_argument("--adapter-dtype", choices=DTYPES, help="of the adapters, where it is not --dtype")
    parser.add_argument("--rank", type=int, help="rank of the adapters (default: 16)")
    parser.add_argument(
        "--shapes",
        metavar="MxNxK[,...]",
        help="tokens x out_features x in_features of your linears, instead of the suite that fits the device",
    )
    parser.add_argument("--dropout", type=float, default=0.0, metavar="P", help="dropout for --shapes (default: 0)")
    parser.add_argument("--only", default="", metavar="WORDS", help="cases with all these words: 'bert-base bf16 p=0'")
    parser.add_argument("--device", help="default: the current GPU if there is one, else the CPU")
    parser.add_argument("--budget", type=float, default=1.0, metavar="S", help="seconds per case (default: 1)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("lora-kernels-bench"),
        help="folder for CSV, JSON and plot (default: ./lora-kernels-bench)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measures; the table and the files grow case by case. 1 if the gate refused a contender, or one raised."""
    from lora_kernels.benchmarking.cases import MODES
    from lora_kernels.benchmarking.plot import plot_speedups
    from lora_kernels.benchmarking.providers import PROVIDERS
    from lora_kernels.benchmarking.records import Environment, write_csv, write_json
    from lora_kernels.benchmarking.report import Table, by_case, summarise
    from lora_kernels.benchmarking.runner import LIMIT_S, run_suite

    device = device_of(arguments.device)
    cases = select_cases(arguments, device)
    print(Environment.current(device).line)
    print("Medians of interleaved rounds; ratios are paired within a round, with their 10th-90th percentile.")
    able = []
    for provider in PROVIDERS:
        reasons = [provider.why_not(case, device) for case in cases]
        if None in reasons:
            able.append(provider)
        else:
            print(f"not timed: {provider.name}: {reasons[0]}")
    table = Table([provider.name for provider in able])
    records: list[Record] = []
    for mode in MODES:
        section = [case for case in cases if case.mode == mode]
        if section:
            print(f"\n{mode}\n{table.header}")
        # Asked for, a shape is timed as it is; the suite's cases get fewer rows where a library is slow.
        limit_s = LIMIT_S if device.type == "cpu" and not arguments.shapes else None
        for found in run_suite(section, able, device=device, budget_s=arguments.budget, limit_s=limit_s):
            records += found
            write_csv(records, arguments.out / "linear.csv")
            write_json(records, arguments.out / "linear.json")
            for case, by_provider in by_case(found).items():
                print(table.row(case, by_provider), flush=True)
    print()
    for provider in able:
        for dtype in DTYPES.values():
            found_summary = summarise(records, provider.name, dtype) if provider.seeded_mask else None
            if found_summary:
                print(found_summary.line())

    drawn = plot_speedups(records, arguments.out / "linear.png")
    print(f"written: {arguments.out}" + ("" if drawn else "; no plot, since matplotlib is not installed"))
    return int(any(record.fault for record in records))


def select_cases(arguments: argparse.Namespace, device: torch.device) -> Sequence[LinearCase]:
    """The device's suite, or the shapes asked for, with the options' dtype and rank."""
    from lora_kernels.benchmarking import cases as suites
    from lora_kernels.validation import check_dropout_p, check_rank

    if not (math.isfinite(arguments.budget) and arguments.budget > 0):
        raise ArgumentError(f"--budget must be a positive number of seconds; got {arguments.budget}.")
    if arguments.shapes:
        check_dropout_p(arguments.dropout, "--dropout")
        cases = _cases_of(arguments.shapes, arguments.dropout)
    elif arguments.dropout:
        raise ArgumentError("--dropout goes with --shapes; the suite has cases with dropout: try --only p=0.1.")
    else:
        cases = list(suites.suite_for(device))
    if arguments.rank is not None:
        check_rank("--rank", arguments.rank)
        cases = [dataclasses.replace(case, R=arguments.rank) for case in cases]
    if arguments.dtype or arguments.adapter_dtype:
        # Unless the adapters' dtype is asked for, they keep to the base's, or, in the suite's mixed cases, to fp32.
        dtype = DTYPES.get(arguments.dtype, "")
        adapter = DTYPES.get(arguments.adapter_dtype, "")
        cases = [
            dataclasses.replace(
                case,
                dtype=dtype or case.dtype,
                adapter_dtype=adapter or (dtype if dtype and case.adapter_dtype == case.dtype else case.adapter_dtype),
            )
            for case in cases
        ]
    chosen = suites.select(dict.fromkeys(cases), arguments.only)  # a suite in one dtype meets some problems twice
    if not chosen:
        raise ArgumentError(f"--only must match a case; got {arguments.only!r}. Try a model such as 'bert-base'.")
    return chosen


def _cases_of(shapes: str, dropout_p: float) -> list[LinearCase]:
    from lora_kernels.benchmarking.cases import MODES, LinearCase

    found = []
    for shape in shapes.split(","):
        sizes = shape.lower().split("x")
        if len(sizes) != 3 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
            raise ArgumentError(
                f"--shapes must be MxNxK, tokens x out_features x in_features, comma-separated; got {shape!r}. "
                "Write it as 4096x14336x4096."
            )
        m, n, k = map(int, sizes)
        for mode in MODES:
            name = f"{m}x{n}x{k}"
            found.append(LinearCase(name, "--shapes", m, n, k, bias=False, dropout_p=dropout_p, mode=mode))
    return found
