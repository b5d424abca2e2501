"""What the planner chooses for Llama-3-8B's linears on an H200, in its model's microseconds: now, and in an older tree.

    python -m bench.modelled [--before CHECKOUT | --rows FILE]

Each cell is forward + backward. Both trees' choices, ways and tiles, are priced by this tree's model, so that a
difference is one of choice. `--rows` holds the model to a linear.csv: what it says of each of `auto`'s rows there.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from lora_kernels.benchmarking.records import Record, read_csv
from lora_kernels.planning.plan import make_plan
from lora_kernels.planning.problem import Problem

SHAPES = {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)}
ROWS = (1, 16, 128, 512, 2048, 8192)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
DEVICE = "NVIDIA H200"
TIMER_US = 8.0
"""Of a forward alone, what its events see of any launch: an H200's library takes 9 us for next to nothing."""


def problems() -> Iterator[tuple[str, float, int, str, Problem]]:
    """Adapters, dropout, M, linear, problem."""
    for (adapters, dtype), p, m, (name, (n, k)) in itertools.product(
        DTYPES.items(), (0.0, 0.1), ROWS, SHAPES.items()
    ):  # fmt: skip
        problem = Problem(
            m, n, k, 16, torch.bfloat16, dtype, p > 0, arch="sm_90", device_type="cuda", sm_count=132, gluon=True
        )
        yield adapters, p, m, name, problem


def choices() -> list[object]:
    """What this tree's planner chooses, as JSON: each direction's way, and the tiles."""
    found: list[object] = []
    for *_, problem in problems():
        plan = make_plan(problem, "auto", triton_available=True)
        tiles = [[kernel, dataclasses.asdict(tile)] for kernel, tile in plan.tiles]
        found.append([[plan.backend, plan.strategy], list(plan.backward_way), tiles])
    return found


def priced(problem: Problem, choice: list[list[object]]) -> float:
    """Microseconds of both directions."""
    from lora_kernels.planning.cost import Costs
    from lora_kernels.planning.plan import kernel_choices
    from lora_kernels.planning.problem import Way
    from lora_kernels.planning.tiles import Tile

    problem = dataclasses.replace(problem, device=DEVICE)
    forward, backward, tiles = choice
    theirs = {kernel: Tile(**fields) for kernel, fields in tiles}  # type: ignore[misc, arg-type]
    costs = Costs(problem, dict(kernel_choices(problem).tiles) | theirs)
    ways = [Way(*way) for way in (forward, backward)]  # type: ignore[arg-type]
    return sum(costs.of(way, backward=bool(direction)) for direction, way in enumerate(ways))


def choices_of(checkout: Path) -> list[list[list[object]]]:
    """`choices` of another tree."""
    # Of its planner alone: the question is this file's.
    command = [sys.executable, str(Path(__file__).resolve()), "--choices"]
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve())}
    done = subprocess.run(command, cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: list[list[list[object]]] = json.loads(done.stdout)
    return found


def table(before: list[list[list[object]]] | None) -> list[str]:
    """Markdown: a row for each M, dropout and dtype of adapters."""
    lines = [
        f"| adapters, p | M | {' | '.join(SHAPES)} |",
        f"|---|---|{'---|' * len(SHAPES)}",
    ]
    after: list[list[list[object]]] = json.loads(json.dumps(choices()))
    listed = list(problems())
    for start in range(0, len(listed), len(SHAPES)):
        cells = []
        for index in range(start, start + len(SHAPES)):
            now = priced(listed[index][-1], after[index])
            then = f"{priced(listed[index][-1], before[index]):.0f} → " if before else ""
            cells.append(f"{then}{now:.0f}")
        adapters, p, m, *_ = listed[start]
        lines.append(f"| {adapters}, {p:g} | {m} | {' | '.join(cells)} |")
    return lines


def held_to(rows: Sequence[Record]) -> list[str]:
    """Markdown: measured and modelled microseconds of each row of `auto`, with the ways that the model takes."""
    lines = [
        f"| case (forwards less {TIMER_US:g} us of the timer) | measured | modelled | measured over modelled |",
        "|---|---|---|---|",
    ]
    for r in rows:
        if r.provider != "auto" or r.median_ms is None:
            continue
        problem = Problem(
            r.M, r.N, r.K, r.R, getattr(torch, r.dtype), getattr(torch, r.adapter_dtype), r.dropout_p > 0,
            arch="sm_90", device_type="cuda", sm_count=132, gluon=True, device=r.device,
        )  # fmt: skip
        plan = make_plan(problem, "auto", triton_available=True)
        ways = [(f"{plan.backend}/{plan.strategy}", plan.costs)]
        if r.mode != "forward":
            ways.append((str(plan.backward_way), plan.backward_costs))
        us = sum(dict(costs)[way] for way, costs in ways)
        adapters = "" if r.adapter_dtype == r.dtype else f", {r.adapter_dtype} adapters"
        case = f"{r.name}, M = {r.M}{adapters}, p = {r.dropout_p:g}: {', '.join(way for way, _ in ways)}"
        measured = 1e3 * r.median_ms - (TIMER_US if r.mode == "forward" else 0.0)
        lines.append(f"| {case} | {measured:.1f} | {us:.1f} | {measured / us:.2f} |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.modelled", description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="checkout of an older commit, to compare with")
    parser.add_argument("--rows", type=Path, help="a linear.csv of a Hopper GPU, to hold the model to")
    parser.add_argument("--choices", action="store_true", help="print this tree's choices as JSON")
    arguments = parser.parse_args(argv)
    if arguments.choices:
        print(json.dumps(choices()))
    elif arguments.rows:
        print("\n".join(held_to(read_csv(arguments.rows, Record))))
    else:
        print("\n".join(table(choices_of(arguments.before) if arguments.before else None)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
