"""The lent minutes of a GPU: right first, then timed; one command, and what it found comes home whatever happens.

    python3 -m bench.first_run --call 1 | --call 2 | --later [--device DEVICE] [--out FOLDER] [--only WORDS]

Call 1, within 430 s, asks whether the kernels are right; call 2, at once after it and within 330 s, how fast they are,
or, where call 1 found faults, where those come from; --later, within 540 s, is for another day. Every part is a process
of its own with a time-out: a crash, a hang or a lack of memory costs that part. In the folder, rewritten every 15 s:
summary.txt, one screen of what ran, how it ended and the ratios, and all.tgz, everything written. Kernels that
`bench.compiled_ahead` has left are used where its canary agrees. Nothing is installed, and neither make nor git is
needed; rows name $LORA_KERNELS_COMMIT, where that is set, as the commit.

Without a GPU it says so and ends with status 3. `--device cpu` rehearses: every part's command in a small form, as far
as a CPU goes, and a list of what only a GPU can show.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import compiled_ahead
from bench.gpu_parts import Part, parts
from lora_kernels.benchmarking.records import Record, device_slug, read_csv

ROOT = Path(__file__).resolve().parents[1]
LOCAL = ROOT / "bench" / "results" / "local"
STATE = "first_run-{device}.json"
"""In LOCAL: what call 1 found, for call 2 on the same machine."""
NO_GPU = 3
KEEP_S = 15.0
LINES_SHOWN = 4
LIMITS = {"1": 430.0, "2": 330.0, "later": 540.0}
"""Seconds of each call; what has no time left is named and left out."""
LEAST_S = 5.0
"""Of a part, to be begun at all."""
_FAILED = re.compile(r"(?:^|\] )(?:FAILED|ERROR) (tests/.+?)(?: - .*)?$", re.MULTILINE)
"""An id may have spaces, `[plain-(150, 200, 168)-one_pass-bf16]`; pytest's summary has the error behind ` - `."""


@dataclass
class Outcome:
    """How a part ended."""

    title: str
    status: str
    seconds: float = 0.0
    log: Path | None = None

    @property
    def text(self) -> str:
        """What it printed."""
        with contextlib.suppress(OSError):
            return self.log.read_text(encoding="utf-8", errors="replace") if self.log else ""
        return ""


def run_part(part: Part, log: Path, folder: Path, limit_s: float) -> Outcome:
    """Runs it in a session of its own, which is killed when its time is up: asked first, then not."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "LORA_KERNELS_CACHE": str(folder / "plans"),
        **compiled_ahead.environment(),
        **dict(part.environment),
    }
    start = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *part.command],
            cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = str(process.wait(limit_s))
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit_s:g} s"
        finally:  # an interrupt of ours, too, must not leave it with the GPU
            for number in (signal.SIGINT, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(4)
            process.wait()
    return Outcome(part.title, status, time.perf_counter() - start, log)


def failed_tests(outcomes: Sequence[Outcome]) -> list[str]:
    """Their ids, each once, from what pytest printed, whether it came to its end or not."""
    found = [name.strip() for outcome in outcomes for name in _FAILED.findall(outcome.text)]
    return list(dict.fromkeys(found))


def ratios(folder: Path) -> list[str]:
    """A line for each timed case: times the frozen linear, in a CUDA graph, and the host's microseconds."""
    lines = []
    for path in sorted(folder.glob("*/linear.csv")):
        by_case: dict[str, list[str]] = {}
        with contextlib.suppress(OSError, ValueError, KeyError):
            for r in read_csv(path, Record):
                if r.cost is None or r.provider == "frozen linear":
                    continue
                beside = [f"graph {r.graph_cost:.2f}"] if r.graph_cost is not None else []
                beside += [f"host {r.host_us:.0f} us"] if r.host_us is not None else []
                told = f" ({', '.join(beside)})" if beside else ""
                adapter = "" if r.adapter_dtype == r.dtype else f", {r.adapter_dtype} adapters"
                case = f"{r.name} {r.dtype}{adapter} M={r.M} p={r.dropout_p:g} {r.mode}"
                by_case.setdefault(case, []).append(f"{r.provider} {r.cost:.2f}{told}")
        lines += [f"  {case}: {'; '.join(found)}" for case, found in by_case.items()]
    return lines


def summary(
    outcomes: Sequence[Outcome], running: str, elapsed_s: float, folder: Path, remarks: Sequence[str] = ()
) -> str:
    """Each part and how it ended, the last lines of those that failed, the failed tests, the ratios."""
    lines = [f"{elapsed_s:.0f} s; running: {running or 'nothing'}", *remarks]
    for outcome in outcomes:
        lines.append(f"== {outcome.title}: {outcome.status}, {outcome.seconds:.0f} s")
        shown = LINES_SHOWN if outcome.status != "0" else 1
        lines += [f"   {line[:160]}" for line in outcome.text.rstrip().splitlines()[-shown:]]
    failed = failed_tests(outcomes)
    if failed:
        lines += [f"{len(failed)} tests failed:", *(f"  {name}" for name in failed[:20])]
    timed = ratios(folder)
    if timed:
        lines += ["times the frozen linear:", *timed]
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def kept(folder: Path, out: Path, text: Callable[[], str]) -> Iterator[None]:
    """While it runs, and at its end, brings what the folder holds to `out`: whoever lends the GPU may take it back."""
    done = threading.Event()

    def keep() -> None:
        (out / "summary.txt").write_text(text(), encoding="utf-8")
        beside = out / "all.tgz.new"
        with tarfile.open(beside, "w:gz") as archive:
            archive.add(folder, arcname="run")
        beside.replace(out / "all.tgz")

    def loop() -> None:
        while not done.wait(KEEP_S):
            with contextlib.suppress(OSError):  # a file that vanishes while it is read
                keep()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        keep()


def memory_gib(device: str) -> float:
    """Of the GPU; enough for everything on a CPU, where nothing is large."""
    if device == "cpu":
        return float("inf")
    return torch.cuda.get_device_properties(torch.device(device)).total_memory / (1 << 30)


def run(call: str, device: str, out: Path, only: str) -> int:
    """All parts of a call; 1 if one of them failed or was left out."""
    start = time.perf_counter()
    folder = out.parent / f"{out.name}-work"
    for path in (folder, out, LOCAL):
        path.mkdir(parents=True, exist_ok=True)
    left = LOCAL / STATE.format(device=device.replace(":", ""))
    state = json.loads(left.read_text(encoding="utf-8")) if call == "2" and left.exists() else {}
    remarks = [compiled_ahead.unpack(compiled_ahead.FOLDER)]
    warmed = any(compiled_ahead.CACHE.glob("*/*.cubin"))
    if call == "2":
        faults = len(state.get("failed", []))
        remarks.append(f"call 1 left {faults} failed tests" if state else "call 1 was not run on this machine")
    outcomes: list[Outcome] = []
    running = [""]

    def elapsed() -> float:
        return time.perf_counter() - start

    def text() -> str:
        return summary(outcomes, running[0], elapsed(), folder, remarks)

    there_gib = memory_gib(device)
    with kept(folder, out, text):
        for number, part in enumerate(parts(call, device, folder, state.get("failed", []), warmed=warmed)):
            if only and not any(word in part.title for word in only.split(",")):
                continue
            time_s = LIMITS[call] - elapsed() - LEAST_S
            if part.needs_gib > there_gib:
                told = f"left out: needs {part.needs_gib:g} GiB of GPU memory, there are {there_gib:.0f}"
                outcomes.append(Outcome(part.title, told))
            elif time_s < min(LEAST_S, part.limit_s):
                outcomes.append(Outcome(part.title, "left out, for want of time"))
            else:
                running[0] = part.title
                slug = re.sub(r"[^a-z0-9]+", "-", part.title.lower())
                outcomes.append(
                    run_part(part, folder / f"{call}-{number:02}-{slug}.log", folder, min(part.limit_s, time_s))
                )
            print(f"{elapsed():5.0f} s  {outcomes[-1].title}: {outcomes[-1].status}", flush=True)
            if call == "1":
                left.write_text(json.dumps({"failed": failed_tests(outcomes)}), encoding="utf-8")
        running[0] = ""
        if device == "cpu":
            remarks += [
                "What only a GPU can show:",
                *(f"  {p.title}: {p.shows}" for p in parts(call, "cuda", folder, [], warmed=warmed)),
            ]
    print(text())
    return int(any(outcome.status != "0" for outcome in outcomes))


def interrupt(number: int, frame: object) -> None:
    """As Ctrl-C, once: `timeout` and make send SIGTERM twice, and the second would cut the clean-up short."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.first_run", description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--call", choices=("1", "2"), default="1", help="of the first day (default: 1)")
    which.add_argument("--later", action="store_true", help="a later day's only call")
    parser.add_argument("--device", default="cuda", help="cpu: a rehearsal of the script")
    parser.add_argument("--out", type=Path, help="folder (default: $OUT, else bench/results/local/<device>)")
    parser.add_argument("--only", default="", help="parts whose title has one of these words, separated by commas")
    arguments = parser.parse_args(argv)
    if arguments.device != "cpu" and not torch.cuda.is_available():
        print("bench.first_run needs a GPU that torch can use, and there is none here; --device cpu rehearses it.")
        return NO_GPU
    default = os.environ.get("OUT") or LOCAL / device_slug(torch.device(arguments.device))
    call = "later" if arguments.later else arguments.call
    # The part that runs is in a session of its own: a SIGTERM would leave it there, holding the GPU.
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        return run(call, arguments.device, Path(arguments.out or default), arguments.only)
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    raise SystemExit(main())
