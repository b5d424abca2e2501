"""Rows read side by side: which of them is ours, who is ahead of it, and by how much."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from bench import providers
from lora_kernels.benchmarking.cases import LinearCase
from lora_kernels.benchmarking.providers import FROZEN, UNFUSED
from lora_kernels.benchmarking.records import Record
from lora_kernels.benchmarking.report import by_case
from lora_kernels.benchmarking.roofline import Ceilings

Found = Mapping[str, Record]


def ours(found: Found) -> Record | None:
    """This package's row of a case: what `backend="auto"` did, or on a CPU the torch backend, which auto is there."""
    for name in (providers.AUTO.name, "torch"):
        record = found.get(name)
        if record is not None and record.timed and (name != "torch" or not record.driver):
            return record
    return None


def rivals(found: Found) -> Iterator[Record]:
    """The timed rows of whoever computes the same: neither the frozen linear nor a part of this package."""
    return (r for r in found.values() if r.timed and r.provider != FROZEN and r.provider not in providers.OWN)


def times_faster(slower: Record, faster: Record) -> float:
    """How many times as fast `faster` is, by the medians of rounds that both were in."""
    assert slower.median_ms is not None and faster.median_ms is not None  # callers compare timed rows
    return slower.median_ms / faster.median_ms


@dataclass(frozen=True)
class Loss:
    """A case in which a rival was faster than this package: `ratio` is its speed over ours, above 1."""

    case: LinearCase
    rival: str
    ratio: float


def losses(records: Iterable[Record]) -> list[Loss]:
    """Every case and rival that beat us, the worst first."""
    found = []
    for case, by_provider in by_case(records).items():
        mine = ours(by_provider)
        if mine is not None:
            ahead = ((r.provider, times_faster(mine, r)) for r in rivals(by_provider))
            found += [Loss(case, name, ratio) for name, ratio in ahead if ratio > 1]
    return sorted(found, key=lambda loss: -loss.ratio)


def shortened(records: Iterable[Record]) -> list[str]:
    """A line for each dtype with cases that were given fewer rows than the suite's: how many, and how far ahead we are.

    Such cases are in the table and under no target, which are for the suite's rows.
    """
    by_dtype: dict[str, list[tuple[Record, Found]]] = {}
    for case, found in by_case(records).items():
        first = next(iter(found.values()))
        if first.shortened:
            by_dtype.setdefault(case.dtypes, []).append((first, found))
    lines = []
    for dtypes, cases in by_dtype.items():
        rows = sorted({first.M for first, _ in cases})
        ahead = [times_faster(found[UNFUSED], own) for _, found in cases
                 if (own := ours(found)) is not None and UNFUSED in found and found[UNFUSED].timed]  # fmt: skip
        times = f"; median over the unfused chain: {statistics.median(ahead):.3g}x" if ahead else ""
        lines.append(
            f"FEWER ROWS: {len(cases)} cases in {dtypes} at M = {', '.join(map(str, rows))}, because the library's "
            f"product is slow here{times}"
        )
    return lines


def describe(case: LinearCase) -> str:
    """`bert-base.up, M = 1024, r = 16, bf16, p = 0.1, forward+backward`."""
    graph = ", CUDA graph" if case.graph else ""
    return f"{case.name}, M = {case.M}, r = {case.R}, {case.dtypes}, p = {case.dropout_p:g}, {case.mode}{graph}"


class SideBySide:
    """The table in the terminal: a case a line, a contender a column, each with its milliseconds and times the frozen.

    Columns that this device cannot fill are left out by the caller.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = list(names)

    @property
    def header(self) -> str:
        """Column titles and a rule."""
        cells = [f"{'case':<20} {'M':>5} {'N':>5} {'K':>5} {'r':>3} {'dtypes':<9} {'p':>3}"]
        title = " ".join([*cells, *(f"{name:>16}" for name in self._names), f"{'roofline':>8}"])
        return f"{title}\n{'-' * len(title)}"

    def row(self, case: LinearCase, found: Found) -> str:
        """One case; below it, a line for each contender that the gate refused or that raised."""
        cells = [
            f"{case.name:<20} {case.M:>5} {case.N:>5} {case.K:>5} {case.R:>3} {case.dtypes:<9} {case.dropout_p:>3g}"
        ]
        cells += [f"{_cell(found.get(name)):>16}" for name in self._names]
        mine = ours(found)
        cells.append(f"{mine.roofline:>8.0%}" if mine is not None and mine.roofline is not None else f"{'-':>8}")
        return "\n".join([" ".join(cells), *(f"    {r.provider} {r.status}" for r in found.values() if r.fault)])


def _cell(record: Record | None) -> str:
    if record is None or record.median_ms is None:
        return (record.fault if record else "") or "-"
    cost = "" if record.cost is None else f" x{record.cost:.2f}"
    return f"{milliseconds(record.median_ms)}{cost}"


def read_ceilings(path: Path) -> Ceilings:
    """The ceilings that a run wrote to its run.json."""
    return Ceilings(**json.loads(path.read_text(encoding="utf-8"))["ceilings"])


def milliseconds(value: float) -> str:
    """Four significant digits or so: `0.0123`, `1.234`, `123.4`."""
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 10 else f"{value:.1f}"
