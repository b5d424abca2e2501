"""The one picture that `lora-kernels bench` draws; nothing happens where matplotlib is not installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from lora_kernels.benchmarking.providers import FROZEN, UNFUSED
from lora_kernels.benchmarking.records import Record
from lora_kernels.benchmarking.report import case_of

COLOURS = ("#0f766e", "#2563a8", "#b45309")


def plot_speedups(records: Sequence[Record], path: Path) -> bool:
    """Bars of time(unfused chain) / time(backend), from 1.0, with 10th-90th percentile whiskers; False if not drawn."""
    timed = [r for r in records if r.speedup is not None and r.provider not in (FROZEN, UNFUSED)]
    if not timed or importlib.util.find_spec("matplotlib") is None:
        return False
    # The object interface, with no pyplot: it picks no window system and leaves no global state behind.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.3 * len(timed)), layout="constrained", dpi=150)
    axes = figure.subplots()
    providers = list(dict.fromkeys(r.provider for r in timed))
    for position, record in enumerate(timed):
        assert record.speedup is not None and record.speedup_p10 is not None and record.speedup_p90 is not None
        colour = COLOURS[providers.index(record.provider) % len(COLOURS)]
        label = record.provider if record is next(r for r in timed if r.provider == record.provider) else None
        axes.barh(position, record.speedup - 1, left=1, color=colour, label=label)
        axes.plot((record.speedup_p10, record.speedup_p90), (position, position), color="black", linewidth=1)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(timed)), [_label(r) for r in timed], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as the unfused chain")
    axes.set_title(f"{timed[0].device}, torch {timed[0].torch}, r = {timed[0].R}", loc="left", fontsize=10)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return True


def _label(record: Record) -> str:
    dropout = f", p={record.dropout_p:g}" if record.dropout_p else ""
    return f"{record.name} {case_of(record).dtypes}{dropout}, {record.mode}"
