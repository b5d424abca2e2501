"""Was the machine ours while we timed? Interleaving is fair to the contenders; a claim needs a quiet machine, too.

OpenMP threads spin at barriers. Where another process holds a core, each parallel region waits out a scheduler slice,
and what is then compared is the number of parallel regions.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

_STAT = Path("/proc/stat")
_TOLERATED_CORES = 0.2


class ForeignLoad:
    """CPU time of all other processes since construction (Linux; elsewhere nothing is known)."""

    def __init__(self) -> None:
        self._wall, self._own, self._busy = time.perf_counter(), _own_seconds(), _busy_seconds()

    def warning(self) -> str | None:
        """A line to print if others took cores that our threads needed, else None."""
        busy = _busy_seconds()
        if busy is None or self._busy is None:
            return None
        wall = max(time.perf_counter() - self._wall, 1e-9)
        others = max(busy - self._busy - (_own_seconds() - self._own), 0.0) / wall
        return contention(others, threads=torch.get_num_threads(), cores=os.cpu_count() or 1)


def contention(others: float, *, threads: int, cores: int) -> str | None:
    """The warning if `threads` of ours and `others` busy cores are more than there are."""
    if others + threads <= cores + _TOLERATED_CORES:
        return None
    return (
        f"NOTE: other processes kept {others:.1f} of {cores} cores busy while {threads} threads were timed; "
        "these times compare how the contenders bear that. Repeat on a quiet machine."
    )


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system


def _busy_seconds() -> float | None:
    """Seconds that all cores together spent neither idle nor waiting for disks, since boot."""
    if not _STAT.exists():
        return None
    # cpu user nice system idle iowait irq softirq steal ...
    ticks = [int(cell) for cell in _STAT.read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
