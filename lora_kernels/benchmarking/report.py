"""Records as text: the table in the terminal, and the summary line under it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lora_kernels.benchmarking.cases import LinearCase
from lora_kernels.benchmarking.providers import FROZEN, UNFUSED
from lora_kernels.benchmarking.records import Record


def case_of(record: Record) -> LinearCase:
    """The case a record belongs to."""
    return LinearCase(
        name=record.name,
        model=record.model,
        M=record.M,
        N=record.N,
        K=record.K,
        R=record.R,
        dtype=record.dtype,
        adapter_dtype=record.adapter_dtype,
        dropout_p=record.dropout_p,
        bias=record.bias,
        mode="forward+backward" if record.mode == "forward+backward" else "forward",
        graph=record.graph,
    )


def by_case(records: Iterable[Record]) -> dict[LinearCase, dict[str, Record]]:
    """Records grouped: case → provider → record, in order of appearance."""
    grouped: dict[LinearCase, dict[str, Record]] = {}
    for record in records:
        grouped.setdefault(case_of(record), {})[record.provider] = record
    return grouped


class Table:
    """The side-by-side table, printable row by row while a suite runs.

    Columns: the case, milliseconds of the frozen linear and of the unfused chain, then for each fused backend its
    milliseconds, its speed-up over the unfused chain (10th to 90th percentile) and its cost over the frozen linear.
    """

    def __init__(self, providers: Sequence[str]) -> None:
        self._fused = [name for name in providers if name not in (FROZEN, UNFUSED)]

    @property
    def header(self) -> str:
        """Column titles and a rule."""
        cells = [f"{'case':<20} {'M':>5} {'N':>5} {'K':>5}  {'dtypes':<9} {'p':>3}  {'frozen':>9} {'unfused':>9}"]
        cells += [f"{name + ' ms':>10}  {'x unfused (p10-p90)':<19} {'x frozen':>8}" for name in self._fused]
        cells.append("kept for backward")
        title = " ".join(cells)
        return f"{title}\n{'-' * len(title)}"

    def row(self, case: LinearCase, records: Mapping[str, Record]) -> str:
        """One case; below it, a line for each contender that the gate refused or that raised."""
        shape = f"{case.name:<20} {case.M:>5} {case.N:>5} {case.K:>5}  {case.dtypes:<9} {case.dropout_p:>3g} "
        cells = [shape + f" {_ms(records.get(FROZEN)):>9} {_ms(records.get(UNFUSED)):>9}"]
        for name in self._fused:
            record = records.get(name)
            cells.append(f"{_ms(record):>10}  {_speedup(record):<19} {_times(record.cost if record else None):>8}")
        cells.append(_saved(records, self._fused))
        faults = [f"    {r.provider} {r.status}" for r in records.values() if r.fault]
        return "\n".join([" ".join(cells), *faults])


def _ms(record: Record | None) -> str:
    if record is None or record.median_ms is None:
        return (record.fault if record else "") or "-"
    return f"{record.median_ms:.3f}" if record.median_ms < 10 else f"{record.median_ms:.1f}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _speedup(record: Record | None) -> str:
    if record is None or record.speedup is None:
        return "-"
    return f"{record.speedup:.2f} ({record.speedup_p10:.2f}-{record.speedup_p90:.2f})"


def _saved(records: Mapping[str, Record], fused: Sequence[str]) -> str:
    """`unfused → fused`, beyond x and the parameters."""
    unfused = records.get(UNFUSED)
    ours = next((records[name] for name in fused if name in records and records[name].timed), None)
    if unfused is None or ours is None or unfused.saved_bytes is None or ours.saved_bytes is None:
        return ""
    return f"{mebibytes(unfused.saved_bytes)} -> {mebibytes(ours.saved_bytes)}"


def mebibytes(count: float) -> str:
    """`3.06 MiB`."""
    return f"{count / 2**20:.2f} MiB" if count < 100 * 2**20 else f"{count / 2**20:.0f} MiB"


@dataclass(frozen=True)
class SuiteSummary:
    """Forward + backward, p = 0, M >= 1024, adapters in the base's dtype: unfused chain / backend over the cases.

    Attributes:
        provider: the backend.
        dtype: of base and adapters.
        cases: how many cases the median is over.
        median: of the cases' median speed-ups.
        slowest: the smallest of them, and `slowest_case` its name.
        slower: names of the cases whose median lies below 1.
    """

    provider: str
    dtype: str
    cases: int
    median: float
    slowest: float
    slowest_case: str
    slower: tuple[str, ...]

    def line(self, target: float | None = None) -> str:
        """The summary in one line, with the target beside it where there is one."""
        verdict = ""
        if target is not None:
            verdict = f" (target {target:.2f}: {'met' if self.median >= target else 'MISSED'})"
        slower = f"slower in {', '.join(self.slower)}" if self.slower else "slower in none"
        return (
            f"{self.provider}, {self.dtype}: {self.median:.3f}x the unfused chain{verdict}, median of {self.cases}"
            f" cases; smallest {self.slowest:.3f} ({self.slowest_case}); {slower}"
        )


def summarise(records: Iterable[Record], provider: str, dtype: str) -> SuiteSummary | None:
    """Summary over the comparable training cases of a dtype, or None where there are none."""
    speedups = {
        record.name: record.speedup
        for record in records
        if record.provider == provider
        and record.dtype == record.adapter_dtype == dtype
        and record.mode == "forward+backward"
        and record.dropout_p == 0
        and record.M >= 1024
        and record.speedup is not None
    }
    if not speedups:
        return None
    slowest = min(speedups, key=lambda name: speedups[name])
    return SuiteSummary(
        provider=provider,
        dtype=dtype,
        cases=len(speedups),
        median=statistics.median(speedups.values()),
        slowest=speedups[slowest],
        slowest_case=slowest,
        slower=tuple(name for name, value in speedups.items() if value < 1),
    )
