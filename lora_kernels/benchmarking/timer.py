"""Interleaved timing: every contender runs in every round, so machine noise hits all of them alike.

Timing A a hundred times and then B a hundred times compares two different machines: clocks drift, neighbours come and
go. Here a round calls each contender once, in an order that rotates and flips from round to round, and ratios are
formed inside a round, between calls that lie milliseconds apart. The median of those ratios is what is reported.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

# Larger than the last-level cache of any GPU on sale (H100 50 MB, B200 126 MB, MI300X 256 MB).
L2_FLUSH_BYTES = 512 * 2**20
# About 2.5 ms of an H200's clock between flush and start. The flush alone keeps the queue busy for 0.1 ms, in which a
# host launches a fused forward, but not forward and backward, which took the one beside that H200 up to 1.4 ms: what is
# timed would be Python.
LEAD_CYCLES = 5_000_000
MIN_ROUNDS, MAX_ROUNDS = 6, 60  # where a time budget decides
SLOW_ROUNDS = 3  # where one round takes more than the budget: a call of seconds is steadier than one of milliseconds


@dataclass(frozen=True)
class Summary:
    """Median of a sample with its 10th and 90th percentile."""

    median: float
    p10: float
    p90: float

    @staticmethod
    def of(values: Sequence[float]) -> Summary:
        """Summarise a non-empty sample; percentiles interpolate linearly between order statistics."""
        if not values:
            raise ValueError("a summary needs at least one value; got none")
        ordered = sorted(values)
        return Summary(_quantile(ordered, 0.5), _quantile(ordered, 0.1), _quantile(ordered, 0.9))


def _quantile(ordered: Sequence[float], q: float) -> float:
    position = q * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


@dataclass(frozen=True)
class Samples:
    """Milliseconds per contender; entry i of every contender was measured in round i.

    Attributes:
        ms: contender name → one time per round.
    """

    ms: Mapping[str, tuple[float, ...]]

    @property
    def rounds(self) -> int:
        """Number of rounds each contender was timed in."""
        return len(next(iter(self.ms.values())))

    def time(self, name: str) -> Summary:
        """Median and spread of one contender's time in milliseconds."""
        return Summary.of(self.ms[name])

    def ratio(self, numerator: str, denominator: str) -> Summary:
        """Median and spread of time(numerator) / time(denominator), paired round by round."""
        pairs = zip(self.ms[numerator], self.ms[denominator], strict=True)
        return Summary.of([a / b for a, b in pairs])


def round_order(names: Sequence[str], index: int) -> list[str]:
    """The order of calls in round `index`: rotated by one each round, and reversed after each full turn.

    Rotation alone would give every contender the same predecessor for ever, and with it that predecessor's cache.
    """
    shift = index % len(names)
    order = [*names[shift:], *names[:shift]]
    return order[::-1] if (index // len(names)) % 2 else order


def planned_rounds(round_s: float, contenders: int, *, budget_s: float, minimum: int, maximum: int) -> int:
    """How many rounds fit in the budget, as a whole number of rotations, so that each starts equally often.

    Three, rotations or not, where not even one round fits: a slow contender is not to eat the budgets of other cases.
    """
    if round_s > budget_s:
        return min(SLOW_ROUNDS, minimum)
    fitting = budget_s / round_s if round_s > 0 else maximum
    rounds = min(max(fitting, minimum), maximum)
    return math.ceil(rounds / contenders) * contenders


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    *,
    device: torch.device,
    rounds: int | None = None,
    budget_s: float = 1.5,
    warmup: int = 1,
) -> Samples:
    """Time several callables in one run, interleaved.

    Args:
        contenders: name → callable; what it returns is dropped at once.
        device: where the work happens. On CUDA, times come from events around the call, after an L2 flush and a short
            wait on the GPU, which keep the queue busy while the host prepares the launches; elsewhere from
            `time.perf_counter`.
        rounds: exact number of rounds; `None` takes as many as fit in `budget_s`.
        budget_s: seconds to spend when `rounds` is None, bounded by `MIN_ROUNDS` and `MAX_ROUNDS`.
        warmup: untimed rounds first (allocator, JIT, clocks).

    Returns:
        One time per contender and round.
    """
    if not contenders:
        raise ValueError("interleave needs at least one contender; got none")
    measure = _CudaClock(device) if device.type == "cuda" else _HostClock()
    names = list(contenders)
    for index in range(warmup):
        for name in round_order(names, index):
            contenders[name]()
    if rounds is None:
        measure.finish()
        start = time.perf_counter()
        for name in names:
            measure.call(contenders[name])
        measure.finish()
        elapsed = time.perf_counter() - start
        rounds = planned_rounds(elapsed, len(names), budget_s=budget_s, minimum=MIN_ROUNDS, maximum=MAX_ROUNDS)
    ms: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        order = round_order(names, index)
        for name in order:
            measure.call(contenders[name])
        for name, value in zip(order, measure.finish(), strict=True):
            ms[name].append(value)
    return Samples({name: tuple(values) for name, values in ms.items()})


def warm_up(device: torch.device, seconds: float) -> None:
    """Products at full load for so long: clocks fall as a chip gets warm, and should do so before the first row."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    out = torch.empty_like(a)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(8):
            torch.mm(a, a, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)


class _HostClock:
    """Wall-clock time of a synchronous call."""

    def __init__(self) -> None:
        self._ms: list[float] = []

    def call(self, fn: Callable[[], object]) -> None:
        start = time.perf_counter()
        result = fn()
        self._ms.append((time.perf_counter() - start) * 1e3)
        del result  # freeing the outputs is the caller's cost, not the contender's

    def finish(self) -> list[float]:
        ms, self._ms = self._ms, []
        return ms


class _CudaClock:
    """GPU time between two events, after an L2 flush; read back once a round, so the queue never drains inside one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device)
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def call(self, fn: Callable[[], object]) -> None:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.device(self._device):
            self._flush.zero_()
            torch.cuda._sleep(LEAD_CYCLES)
            start.record()
            fn()
            end.record()
        self._events.append((start, end))

    def finish(self) -> list[float]:
        torch.cuda.synchronize(self._device)
        ms = [start.elapsed_time(end) for start, end in self._events]
        self._events.clear()
        return ms
