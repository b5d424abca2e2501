"""`lora-kernels tune`: time the plans for your shapes on this machine and keep the winners."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch

from lora_kernels.cli.bench import DTYPES, select_cases
from lora_kernels.cli.devices import device_of


def add_parser(commands: Any) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "tune",
        help="time the plans for your shapes, keep the winners",
        description="For each problem and direction, every composition that can serve it is checked against fp64, "
        "then timed; `auto` takes the fastest from then on. Stop it at any time: what is measured is kept.",
    )
    parser.add_argument("--shapes", metavar="MxNxK[,...]", help="your linears, instead of the device's suite")
    parser.add_argument("--only", default="", metavar="WORDS", help="the suite's cases with all these words")
    parser.add_argument("--rank", type=int, help="rank of the adapters (default: 16)")
    parser.add_argument("--dtype", choices=DTYPES, help="of x, weight and adapters (default: the suite's)")
    parser.add_argument("--adapter-dtype", choices=DTYPES, help="of the adapters, where it is not --dtype")
    parser.add_argument("--dropout", type=float, default=0.0, metavar="P", help="dropout for --shapes (default: 0)")
    parser.add_argument("--device", help="default: the current GPU if there is one, else the CPU")
    parser.add_argument("--budget", type=float, default=120.0, metavar="S", help="seconds in all (default: 120)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Tunes; 1 where nothing could be kept, 130 where it was interrupted."""
    from lora_kernels import ops
    from lora_kernels.benchmarking.records import Environment
    from lora_kernels.benchmarking.tuner import DeviceLostError, questions, tune
    from lora_kernels.planning import measured
    from lora_kernels.planning.device import device_traits

    device = device_of(arguments.device)
    asked = questions(select_cases(arguments, device))
    name = device_traits(device.type, device.index).name
    print(Environment.current(device).line)
    print(f"{len(asked)} questions, {arguments.budget:g} s; kept in {measured.path_of(name) or 'this process alone'}")
    deadline = time.monotonic() + arguments.budget
    done, left_out, status = 0, 0, 0
    try:
        for index, question in enumerate(asked):
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                left_out += len(asked) - index
                break
            _progress(index, len(asked), remaining, question.line)
            try:
                # Half of a question's share is for compiling and for checking.
                share = remaining / (len(asked) - index) / 2
                outcome = tune(question, device, budget_s=share)
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
                left_out += 1
                _line(f"{question.line}  left out: {str(error).splitlines()[0]}")
                continue
            if outcome.timings:
                measured.record(name, outcome.key, outcome.timings)
                done += 1
            else:
                left_out += 1
            _line(_summary(question.line, outcome.timings, outcome.refused))
    except KeyboardInterrupt:
        left_out, status = len(asked) - done, 130
        _line("interrupted")
    except OSError as error:
        _line(f"not kept: {error}")
        status = 1
    except DeviceLostError as error:
        _line(f"stopped: {error}")
        left_out, status = len(asked) - done, 1
    for operation in ops.OPERATIONS:
        operation.forget_plans()
    print(f"{done} of {len(asked)} kept" + (f", {left_out} left out" if left_out else ""))
    return status or int(done == 0)


def _out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """A GPU's has a class of its own; the CPU's allocator raises a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _summary(question: str, timings: Any, refused: Any) -> str:
    ranked = sorted(timings.items(), key=lambda item: item[1].us)
    figures = "  ".join(f"{way} {timing.us:.1f} us" for way, timing in ranked) or "nothing could be timed"
    notes = "".join(f"\n    {way}: {reason}" for way, reason in refused.items())
    return f"{question}  {figures}{notes}"


BAR = 24


def _progress(done: int, of: int, seconds_left: float, what: str) -> None:
    if sys.stderr.isatty():
        filled = BAR * done // of
        bar = "#" * filled + "." * (BAR - filled)
        print(f"\r[{bar}] {done}/{of}  {seconds_left:.0f} s left  {what}\033[K", end="", file=sys.stderr, flush=True)


def _line(text: str) -> None:
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    print(text, flush=True)
