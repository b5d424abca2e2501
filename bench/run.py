"""What `make bench` runs: check, the linear side by side, and the fine-tuning; tables, CSV and plots at the end.

    python -m bench.run [--device DEVICE] [--out FOLDER]

Nothing is timed on a machine where `check` fails. Exit status 1 if a result is wrong, whatever the speeds are.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import finetune, linear
from lora_kernels.benchmarking.cases import suite_for
from lora_kernels.benchmarking.records import device_slug
from lora_kernels.cli import main as lora_kernels


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--out", type=Path, help="folder for CSV, JSON and plots (default: bench/results/local/<device>)"
    )
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    out = arguments.out or linear.RESULTS / device_slug(device)
    start = time.perf_counter()

    _heading("1/3  Is it right? Every backend against fp64")
    if lora_kernels(["check"]):
        print("\ncheck failed, so nothing is timed")
        return 1

    _heading("2/3  One linear: frozen, unfused, fused")
    records = linear.run(suite_for(device), device, out, budget_s=linear.BUDGET_S)

    _heading("3/3  Fine-tuning a pretrained encoder")
    config, _ = finetune.configure(["--device", str(device)])
    outcome = finetune.run(config, out)

    _heading("Summary")
    print("\n".join([*linear.summary(records, device), "", *finetune.report(outcome)]))
    print(f"\n{time.perf_counter() - start:.0f} s; tables and plots in {out}:")
    print("\n".join(f"  {path.name}" for path in sorted(out.iterdir())))
    return int(any(record.fault for record in records) or finetune.failed(outcome))


def _heading(title: str) -> None:
    print(f"\n{title}\n{'=' * len(title)}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
