"""One linear at a time: frozen, unfused and fused side by side, interleaved in one run.

python -m bench.linear [--only WORDS] [--budget SECONDS] [--out FOLDER]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from bench import plots
from bench.providers import FROZEN, PROVIDERS, UNFUSED
from lora_kernels.benchmarking import cases as suites
from lora_kernels.benchmarking.cases import LinearCase
from lora_kernels.benchmarking.load import ForeignLoad
from lora_kernels.benchmarking.plot import plot_speedups
from lora_kernels.benchmarking.records import Environment, Record, device_slug, write_csv, write_json
from lora_kernels.benchmarking.report import Table, by_case, summarise
from lora_kernels.benchmarking.runner import run_suite

RESULTS = Path(__file__).parent / "results" / "local"
BUDGET_S = 1.0  # of timing per case, at least six rounds
# Speed-up over the unfused chain that the torch backend is held to on a CPU, forward + backward.
CPU_TARGETS = {"float32": 1.06, "bfloat16": 1.12}


def run(cases: Sequence[LinearCase], device: torch.device, out: Path, *, budget_s: float) -> list[Record]:
    """Measure, print the tables while they grow, write CSV and JSON to `out` after each case, and plots at the end.

    Returns:
        All records; the caller decides what a fault in one means.
    """
    print(Environment.current(device).line)
    print("Medians of interleaved rounds; ratios are paired within a round, with their 10th-90th percentile.")
    able = [provider for provider in PROVIDERS if any(provider.why_not(case, device) is None for case in cases)]
    table = Table([provider.name for provider in able])
    records: list[Record] = []
    load = ForeignLoad()
    with tqdm(total=len(cases), desc="linear", unit="case", leave=False, disable=None) as bar:
        for mode in suites.MODES:
            section = [case for case in cases if case.mode == mode]
            if section:
                bar.write(f"\n{mode}\n{table.header}")
            for found in run_suite(section, PROVIDERS, device=device, budget_s=budget_s):
                records += found
                write_csv(records, out / "linear.csv")
                write_json(records, out / "linear.json")
                for case, by_provider in by_case(found).items():
                    bar.write(table.row(case, by_provider))
                bar.update()
    if warning := load.warning():
        print(f"\n{warning}")
    plot_speedups(records, out / "linear_speedup.png")
    plots.saved_bytes(records, out / "linear_saved_bytes.png")
    return records


def summary(records: Sequence[Record], device: torch.device) -> list[str]:
    """The lines under the table: median speed-up per dtype against its target, every case that loses, gate outcome."""
    lines = []
    fused = dict.fromkeys(r.provider for r in records if r.provider not in (FROZEN, UNFUSED))
    for provider in fused:
        for dtype, target in CPU_TARGETS.items():
            found = summarise(records, provider, dtype)
            if found:
                lines.append(found.line(target if device.type == "cpu" and provider == "torch" else None))
    lines += [
        f"slower than unfused: {r.provider} on {r.name} ({r.dtype}, p = {r.dropout_p:g}, {r.mode}): {r.speedup:.2f}x"
        for r in records
        if r.provider in fused and r.speedup is not None and r.speedup < 1
    ]
    lines += [f"FAULT: {r.provider} on {r.name} ({r.dtype}, {r.mode}) {r.status}" for r in records if r.fault]
    checked = sum(r.error is not None for r in records)
    refused = sum(r.fault == "refused" for r in records)
    lines.append(f"correctness gate: {checked - refused} of {checked} within twice eager's error against fp64")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; exit status 1 if a contender was refused or raised, whatever the speeds are."""
    parser = argparse.ArgumentParser(prog="python -m bench.linear", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="words a case must contain, such as 'bert-base bf16 p=0'")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds of timing per case (at least 6 rounds)")
    parser.add_argument(
        "--out", type=Path, help="folder for CSV, JSON and plots (default: bench/results/local/<device>)"
    )
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    cases = suites.select(suites.suite_for(device), arguments.only)
    if not cases:
        parser.error(f"--only {arguments.only!r} matches no case")
    out = arguments.out or RESULTS / device_slug(device)
    records = run(cases, device, out, budget_s=arguments.budget)
    print("\n" + "\n".join(summary(records, device)))
    print(f"written: {out}")
    return int(any(record.fault for record in records))


if __name__ == "__main__":
    raise SystemExit(main())
