"""What `make bench` runs: check, one linear side by side, host time, and the fine-tuning; tables, CSV and plots.

    python -m bench.run [--device DEVICE] [--out FOLDER] [--seconds SECONDS]

Nothing is timed on a device where `check` fails, on a GPU `check --quick`. Each part ends when its share of the time is
over and says what it left out. Exit status 1 if a result is wrong, whatever the speeds are.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import finetune, host, linear, suites
from lora_kernels.benchmarking.records import device_slug, write_csv
from lora_kernels.cli import main as lora_kernels

SECONDS = 275.0
# What the fine-tuning takes besides its steps: reading the texts, the linear probe, the held-out accuracies.
AROUND_STEPS_S = 50.0
LINEAR = 0.55  # share of what is left after the check
MIN_STEPS_S = 20.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--out", type=Path, help="folder for CSV, JSON and plots (default: bench/results/local/<device>)"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for everything (default: {SECONDS:.0f})")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    out = arguments.out or linear.RESULTS / device_slug(device)
    start = time.perf_counter()

    def left() -> float:
        return arguments.seconds - (time.perf_counter() - start)

    def heading(title: str) -> None:
        print(f"\n{title}  ({linear.clock(left())} left)\n{'=' * len(title)}", flush=True)

    heading("1/4  Is it right? Every backend against fp64")
    if lora_kernels(check_of(device)):
        print("\ncheck failed, so nothing is timed")
        return 1

    heading("2/4  One linear: frozen, unfused, the peers, and ours")
    cases = linear.chosen_cases(suites.default_suite(device), "", device)
    if device.type == "cpu":
        print(f"No GPU: the suite for CPUs, peers in some of its cases. Left out: {_gpu_only()}.")
    found = linear.run(cases, device, out, total_s=LINEAR * left())

    heading("3/4  Host time of a call")
    host_rows = host.measure(device)
    write_csv(host_rows, out / "host.csv")
    print("\n".join(host.lines(host_rows)))

    heading("4/4  Fine-tuning a pretrained encoder")
    seconds = max(left() - AROUND_STEPS_S, MIN_STEPS_S)
    config, _ = finetune.configure(["--device", str(device), "--seconds", f"{seconds:.0f}"])
    outcome = finetune.run(config, out)

    heading("Summary")
    print("\n".join([*linear.summary(found), "", *finetune.report(outcome)]))
    print(f"\n{time.perf_counter() - start:.0f} s; tables and plots in {out}:")
    print("\n".join(f"  {path.name}" for path in sorted(out.iterdir())))
    return int(any(record.fault for record in found.records) or finetune.failed(outcome))


def check_of(device: torch.device) -> list[str]:
    """The check of what is timed. In full on a CPU; on a GPU, where that may compile for minutes, the quick one."""
    return ["check", "--device", str(device), *(["--quick"] if device.type == "cuda" else [])]


def _gpu_only() -> str:
    """The suites that need a GPU, with their sizes."""
    return ", ".join(f"{name} ({len(suites.suite(name))} cases)" for name in suites.NAMES if name != suites.CPU)


if __name__ == "__main__":
    raise SystemExit(main())
