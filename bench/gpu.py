"""Everything a GPU is asked once it is there, in one command and one time budget.

    python -m bench.gpu [--budget SECONDS] [--out FOLDER]

Check against fp64, then ceilings and all strategies side by side, then `lora-kernels tune`, host time, and the suite
under the tuned plans, most important cases first, for as long as the budget lasts. Each part is a process of its own:
an illegal access in one kernel would make every later launch of its process fail, too. A check that fails, or has no
time to end, is said at the end and is the exit status, but stops nothing: what is timed is held to fp64 case by case,
and a contender that is refused there has no time. Nothing but torch and Triton is needed, and nothing is installed.
`--device cpu` walks through the same parts on a CPU, to try the script.

In the folder, while it runs and at the end: log.txt, linear.csv, run.json, strategies.csv, host.csv, plans.json (what
was tuned; plans of the machine's user take no part) and, where pytest-benchmark is installed,
linear_benchmark.json. `python -m bench.plots FOLDER` draws the pictures anywhere.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

from bench import providers
from lora_kernels.benchmarking.records import device_slug

ROOT = Path(__file__).resolve().parents[1]
BUDGET_S = 540.0
# Shares of the budget; the suite has what the others leave.
CHECK, STRATEGIES, TUNE, HOST = 0.3, 0.2, 0.15, 0.1
SPARE_S = 5.0  # for writing; a last case that was begun in time has three of them
KEEP_S = 5.0  # between two looks at what there is to keep; whoever lends the GPU may end this process without notice
NO_GPU = 3


@dataclass(frozen=True)
class Part:
    """One process: its title, its module and arguments, and the share of the budget it may take."""

    title: str
    command: tuple[str, ...]
    share: float


def parts(device: torch.device, folder: Path, budget_s: float) -> list[Part]:
    """What is run before the suite, in order."""
    where = ("--device", str(device))
    gpu = device.type == "cuda"
    contenders = [*providers.BASELINES[:1], providers.ADDMM, *providers.OURS]
    strategies = (
        "bench.linear", *where, "--suite", "strategies" if gpu else "cpu", "--only", "" if gpu else "minilm.attention",
        "--providers", ",".join(provider.name for provider in contenders), "--budget", "0.4", "--rows-only",
        "--total", f"{STRATEGIES * budget_s / 2:.1f}", "--out", str(folder / "strategies"),
    )  # fmt: skip
    listed = [
        Part("check", ("lora_kernels", "check", "--quick", *where), CHECK),
        Part("ceilings and strategies", strategies, STRATEGIES),
    ]
    # Of the tuner's share, half is for compiling what it times.
    tuned = ("--only", "" if gpu else "minilm.attention", "--budget", f"{TUNE * budget_s / 2:.0f}")
    listed.append(Part("tune", ("lora_kernels", "tune", *where, *tuned), TUNE))
    listed.append(Part("host time", ("bench.host", *where, "--out", str(folder)), HOST))
    return listed


def suite(device: torch.device, folder: Path, total_s: float) -> Part:
    """The suite, in what is left of the budget."""
    name, only = ("gpu", "") if device.type == "cuda" else ("cpu", "minilm.attention")
    command = (
        "bench.linear", "--device", str(device), "--suite", name, "--only", only, "--budget", "0.6", "--rows-only",
        "--total", f"{total_s:.1f}", "--out", str(folder / "suite"),
        "--ceilings", str(folder / "strategies" / "run.json"),
    )  # fmt: skip
    return Part("suite", command, 1.0)


def run_part(part: Part, log: TextIO, folder: Path, out: Path, timeout_s: float) -> str:
    """Runs it, its output on the screen and in the log; returns what went wrong, or nothing."""
    title = f"\n{part.title}\n{'=' * len(part.title)}"
    print(title, flush=True)
    print(title, file=log)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # peft may have been brought along on it
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    environment["LORA_KERNELS_CACHE"] = str(folder / "plans")
    process = subprocess.Popen(
        [sys.executable, "-m", *part.command],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True,  # with its compiler's workers, which hold the same pipe
    )  # fmt: skip
    late = threading.Timer(timeout_s, os.killpg, (process.pid, signal.SIGKILL))
    late.start()
    assert process.stdout is not None  # it was asked for
    kept = time.perf_counter()
    try:
        with process.stdout as output:
            for line in output:
                print(line, end="", flush=True)
                log.write(line)
                if time.perf_counter() - kept > KEEP_S:
                    log.flush()
                    keep(folder, out)
                    kept = time.perf_counter()
        status = process.wait()
        in_time = late.is_alive()
    finally:
        late.cancel()
        if process.poll() is None:  # an interrupt reaches this process only, not another session's
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.flush()
        keep(folder, out)
    if not in_time:
        return f"{part.title}: stopped after {timeout_s:.0f} s"
    return f"{part.title}: exit status {status}" if status else ""


def run(device: torch.device, out: Path, budget_s: float) -> int:
    """All parts; 1 if one of them failed, and what was measured stays."""
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as temporary, (out / "log.txt").open("w", encoding="utf-8") as log:
        folder = Path(temporary)

        def left() -> float:
            return budget_s - (time.perf_counter() - start)

        def do(part: Part, timeout_s: float) -> None:
            late = f"{part.title}: left out, for want of time"
            fault = run_part(part, log, folder, out, timeout_s) if timeout_s > 0 else late
            faults.extend([fault] if fault else [])

        for part in parts(device, folder, budget_s):
            do(part, part.share * budget_s)
        time_s = left() - SPARE_S
        do(suite(device, folder, time_s - 3 * SPARE_S), time_s)
        outcome = "; ".join(faults) or "every part done"
        line = f"\n{outcome}; {time.perf_counter() - start:.0f} of {budget_s:.0f} s; written: {out}"
        print(line)
        print(line, file=log)
    return int(bool(faults))


def interrupt(number: int, frame: object) -> None:
    """As Ctrl-C, once: `timeout` and make send SIGTERM twice, and the second would cut the clean-up short."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def keep(folder: Path, out: Path) -> None:
    """The files worth bringing home, flat."""
    for source, name in (
        ("suite/linear.csv", "linear.csv"),
        ("suite/run.json", "run.json"),
        ("suite/linear_benchmark.json", "linear_benchmark.json"),
        ("strategies/linear.csv", "strategies.csv"),
        ("host.csv", "host.csv"),
    ):
        if (folder / source).exists():
            shutil.copyfile(folder / source, out / name)
    for plans in (folder / "plans").glob("plans-*.json"):
        shutil.copyfile(plans, out / "plans.json")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cpu: a dry run of the script, no benchmark")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for everything (default: 540)")
    parser.add_argument("--out", type=Path, help="folder (default: $OUT, else bench/results/local/<device>)")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench.gpu needs a GPU that torch can use, and there is none here; --device cpu tries the script.")
        return NO_GPU
    default = os.environ.get("OUT") or ROOT / "bench" / "results" / "local" / device_slug(device)
    # The part that runs is in a session of its own: a SIGTERM would leave it there, holding the GPU.
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        return run(device, arguments.out or Path(default), arguments.budget)
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    raise SystemExit(main())
