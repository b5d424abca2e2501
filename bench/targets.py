"""The table of targets, each with the rows it is judged by. A target without its rows is not measured, never met."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from bench import host, suites
from bench.comparison import ours, times_faster
from bench.providers import ADDMM, COMPILED, COMPILED_MAX, LORAFUSION_STYLE, PEFT
from lora_kernels.benchmarking.cases import LinearCase
from lora_kernels.benchmarking.providers import FROZEN, UNFUSED
from lora_kernels.benchmarking.records import Record
from lora_kernels.benchmarking.report import by_case

Kind = Literal["gpu", "cpu"]


@dataclass(frozen=True)
class Evidence:
    """What a device folder holds: timed rows by case and contender, and the host's rows."""

    cases: Mapping[LinearCase, Mapping[str, Record]]
    host: Sequence[host.HostRow]
    kind: Kind

    @staticmethod
    def of(records: Sequence[Record], host_rows: Sequence[host.HostRow] = ()) -> Evidence:
        """All rows of one device, but for those of cases with fewer rows than the targets are for."""
        kind: Kind = "gpu" if records and records[0].driver else "cpu"
        return Evidence(by_case(record for record in records if not record.shortened), host_rows, kind)


@dataclass(frozen=True)
class Target:
    """One promise.

    Attributes:
        what: of which rows.
        bound: the number to reach.
        at_most: whether smaller is better.
        unit: "x" for ratios, "us", or "of x".
        kind: where it is to hold; None: everywhere.
        measure: the number found, or None where a row it needs is missing.
    """

    what: str
    bound: float
    at_most: bool
    unit: str
    kind: Kind | None
    measure: Callable[[Evidence], float | None]

    @property
    def limit(self) -> str:
        """`at most 1.06x`."""
        return f"{'at most' if self.at_most else 'at least'} {self._number(self.bound)}"

    def outcome(self, evidence: Evidence) -> tuple[str, str]:
        """What was found and the verdict: met, MISSED or not measured."""
        value = self.measure(evidence) if self.kind in (None, evidence.kind) else None
        if value is None:
            return "", "not measured"
        met = value <= self.bound if self.at_most else value >= self.bound
        return self._number(value), "met" if met else "MISSED"

    def _number(self, value: float) -> str:
        if self.unit == "us":
            return f"{value:.1f} µs"
        if self.unit == "of x":
            return f"{value:.4f} of x"
        return f"{value:.3f}x"


def _layer(evidence: Evidence, wanted: LinearCase, against: Sequence[str]) -> tuple[float, float] | None:
    """Milliseconds of a Llama-3-8B layer's seven linears, ours and the rival's, the fastest of `against` in each.

    None unless every linear has both. A shape that two linears share was timed once and counts twice.
    """
    mine = theirs = 0.0
    counted: set[str] = set()
    for case, found in evidence.cases.items():
        if not _same_settings(case, wanted):
            continue
        own = ours(found)
        times = [r.median_ms for name in against if (r := found.get(name)) is not None and r.median_ms is not None]
        positions = set(case.name.partition(".")[2].split("+")) - counted
        if own is None or own.median_ms is None or not times:
            continue
        counted |= positions
        mine += own.median_ms * len(positions)
        theirs += min(times) * len(positions)
    complete = {linear.position for linear in suites.LLAMA3_8B.linears} == counted
    return (mine, theirs) if complete else None


def _same_settings(case: LinearCase, wanted: LinearCase) -> bool:
    keys = ("model", "M", "R", "dtype", "adapter_dtype", "dropout_p", "mode", "graph")
    return all(getattr(case, key) == getattr(wanted, key) for key in keys)


def _training(adapter_dtype: str, dropout_p: float) -> LinearCase:
    return LinearCase(
        "", suites.LLAMA3_8B.name, 8192, 0, 0, 16,
        dtype="bfloat16", adapter_dtype=adapter_dtype, dropout_p=dropout_p, bias=False,
    )  # fmt: skip


def _over_frozen(evidence: Evidence) -> float | None:
    layer = _layer(evidence, _training("bfloat16", 0.0), (FROZEN,))
    return layer[0] / layer[1] if layer else None


def _faster_than(adapter_dtype: str, dropout_p: float, *rivals: str) -> Callable[[Evidence], float | None]:
    def measure(evidence: Evidence) -> float | None:
        layer = _layer(evidence, _training(adapter_dtype, dropout_p), rivals)
        return layer[1] / layer[0] if layer else None

    return measure


def _least_over_addmm(evidence: Evidence) -> float | None:
    pairs = [
        (found[ADDMM.name], own)
        for case, found in evidence.cases.items()
        if ADDMM.name in found and found[ADDMM.name].timed and not case.dropout_p and (own := ours(found)) is not None
    ]
    return min((times_faster(theirs, own) for theirs, own in pairs), default=None)


def _decode(evidence: Evidence) -> float | None:
    costs = {}
    for case, found in evidence.cases.items():
        own = ours(found)
        if case.model == suites.LLAMA3_8B.name and case.graph and case.M <= 64 and case.R == 16 and own is not None:
            costs[case.N, case.K, case.M] = own.cost
    shapes = [(x.N, x.K, m) for x in suites.LLAMA3_8B.distinct for m in suites.DECODE.tokens]
    found_costs = [costs.get(shape) for shape in shapes]
    known = [cost for cost in found_costs if cost is not None]
    return max(known) if len(known) == len(shapes) else None


def _kept_beyond_xa(evidence: Evidence) -> float | None:
    """The largest share of x's bytes kept besides x and xa; the eight bytes of the seed are not counted."""
    shares = []
    for case, found in evidence.cases.items():
        own = ours(found)
        if own is not None and own.saved_bytes is not None:
            xa = case.M * case.R * case.torch_adapter_dtype.itemsize
            seed = 8 if case.dropout_p else 0
            shares.append((own.saved_bytes - xa - seed) / (case.M * case.K * case.torch_dtype.itemsize))
    return max(shares, default=None)


def _host(evidence: Evidence) -> float | None:
    return max((row.over_nothing_us for row in evidence.host if row.contender == "lora_linear"), default=None)


def _cpu_speedups(evidence: Evidence, dtypes: Iterable[str]) -> list[float]:
    """Forward + backward, r = 16, M >= 1024, p = 0, adapters in the base's dtype: unfused chain over ours."""
    return [
        own.speedup
        for case, found in evidence.cases.items()
        if case.dtype == case.adapter_dtype and case.dtype in set(dtypes)
        if case.backward and case.R == 16 and case.M >= 1024 and not case.dropout_p and UNFUSED in found
        if (own := ours(found)) is not None and own.speedup is not None
    ]  # fmt: skip


def _cpu_median(dtype: str) -> Callable[[Evidence], float | None]:
    def measure(evidence: Evidence) -> float | None:
        speedups = _cpu_speedups(evidence, [dtype])
        return statistics.median(speedups) if speedups else None

    return measure


def _cpu_least(evidence: Evidence) -> float | None:
    return min(_cpu_speedups(evidence, ("float32", "bfloat16")), default=None)


def _cpu_over_frozen(evidence: Evidence) -> float | None:
    costs = [
        own.cost
        for case, found in evidence.cases.items()
        if case.K == case.N == 2048 and case.backward and case.R == 16 and not case.dropout_p
        if (own := ours(found)) is not None and own.cost is not None
    ]
    return max(costs, default=None)


_LAYER = "Llama-3-8B layer, M = 8192, r = 16, bf16, forward + backward"
_CPU_CASES = "CPU, M >= 1024, r = 16, p = 0, forward + backward"
TARGETS = (
    Target(f"{_LAYER}, p = 0: over the frozen layer", 1.06, True, "x", "gpu", _over_frozen),
    Target(
        f"{_LAYER}, p = 0.1: PEFT's default (fp32 adapters, autocast) over ours",
        1.45, False, "x", "gpu", _faster_than("float32", 0.1, PEFT.name),
    ),
    Target(
        f"{_LAYER}, p = 0.1: PEFT with bf16 adapters over ours",
        1.25, False, "x", "gpu", _faster_than("bfloat16", 0.1, PEFT.name),
    ),
    Target(
        f"{_LAYER}, p = 0: torch.compile of the unfused layer, the better mode timed, over ours",
        1.15, False, "x", "gpu", _faster_than("bfloat16", 0.0, COMPILED.name, COMPILED_MAX.name),
    ),
    Target(
        f"{_LAYER}, p = 0: cuBLAS + addmm_ over ours",
        1.07, False, "x", "gpu", _faster_than("bfloat16", 0.0, ADDMM.name),
    ),
    Target("cuBLAS + addmm_ over ours, the least of all shapes, p = 0", 1.0, False, "x", "gpu", _least_over_addmm),
    Target(
        f"{_LAYER}, p = 0.1: LoRAFusion-style over ours",
        1.03, False, "x", "gpu", _faster_than("bfloat16", 0.1, LORAFUSION_STYLE.name),
    ),
    Target(
        "Decode, M = 1, 16, 64, CUDA graph, r = 16: over frozen, the worst Llama-3-8B linear",
        1.05, True, "x", "gpu", _decode,
    ),
    Target("Kept for backward beyond x and xa, the most of all cases", 1 / 16, True, "of x", None, _kept_beyond_xa),
    Target(
        "GPU: host time per forward + backward, over the same autograd.Function doing nothing",
        25.0, True, "us", "gpu", _host,
    ),
    Target(
        f"{_CPU_CASES}, bf16: unfused chain over ours, the median of shapes",
        1.15, False, "x", "cpu", _cpu_median("bfloat16"),
    ),
    Target(
        f"{_CPU_CASES}, fp32: unfused chain over ours, the median of shapes",
        1.08, False, "x", "cpu", _cpu_median("float32"),
    ),
    Target(
        f"{_CPU_CASES}, fp32 and bf16: unfused chain over ours, the least of all shapes",
        1.0, False, "x", "cpu", _cpu_least,
    ),
    Target("CPU, K = N = 2048, forward + backward: over the frozen linear", 1.07, True, "x", "cpu", _cpu_over_frozen),
)  # fmt: skip


def table(evidence: Evidence) -> list[tuple[str, str, str, str]]:
    """What, limit, found and verdict of every target."""
    return [(target.what, target.limit, *target.outcome(evidence)) for target in TARGETS]
