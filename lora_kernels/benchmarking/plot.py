"""The speed-ups as bars, and the style of every picture; nothing is drawn where matplotlib is not installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_kernels.benchmarking.cases import MODES, LinearCase
from lora_kernels.benchmarking.providers import FROZEN, UNFUSED
from lora_kernels.benchmarking.records import Record
from lora_kernels.benchmarking.report import by_case

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
DTYPE_COLOURS = {"fp32": "#2563a8", "bf16": "#0f766e", "bf16+fp32": "#7c3aed", "fp16": "#b45309"}

STYLE: Any = {  # newer matplotlibs list every key in their types, older ones have no types
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.dpi": 150,
    "savefig.bbox": "tight",
    "legend.frameon": False,
}


def plot_speedups(records: Sequence[Record], path: Path) -> bool:
    """Time of the unfused chain over time of each fused backend: one column per backend, one panel per mode.

    Bars start at 1.0, where nothing is gained; whiskers are 10th to 90th percentile.

    Returns:
        False if there is nothing to draw, or nothing to draw it with.
    """
    timed = [r for r in records if r.speedup is not None and r.provider not in (FROZEN, UNFUSED)]
    if not timed or importlib.util.find_spec("matplotlib") is None:
        return False
    # The object interface, with no pyplot: it picks no window system and leaves no global state behind.
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    providers = list(dict.fromkeys(r.provider for r in timed))
    cases = by_case(timed)
    sections = {mode: [case for case in cases if case.mode == mode] for mode in reversed(MODES)}
    sections = {mode: section for mode, section in sections.items() if section}
    heights = [len(section) + 1 for section in sections.values()]  # 1: for the title and the ticks
    with rc_context(STYLE):
        figure = Figure(
            figsize=(3.2 + 4.6 * len(providers), 1.2 + 0.24 * sum(heights)),
            layout="constrained",
        )
        grid = figure.subplots(
            len(sections), len(providers), squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights}
        )
        for row, (mode, section) in zip(grid, sections.items(), strict=True):
            for axes, provider in zip(row, providers, strict=True):
                found = {case: cases[case][provider] for case in section if provider in cases[case]}
                _panel(axes, section, found, labels=provider == providers[0])
                axes.set_title(f"{mode}, {provider} backend")
        for axes in grid[-1]:
            axes.set_xlabel("times as fast as the unfused chain")
        used = list(dict.fromkeys(case.dtypes for case in cases))
        handles = [Patch(color=DTYPE_COLOURS.get(name, MUTED)) for name in used]
        figure.legend(handles, used, loc="outside lower center", ncols=len(used))
        headline(figure, "LoRA linear against the unfused chain", provenance(timed[0]))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    return True


def _panel(axes: Axes, section: Sequence[LinearCase], found: Mapping[LinearCase, Record], *, labels: bool) -> None:
    for position, case in enumerate(section):
        if case not in found:  # refused on this backend, timed on another
            continue
        record = found[case]
        speedup, p10, p90 = record.speedup, record.speedup_p10, record.speedup_p90
        assert speedup is not None and p10 is not None and p90 is not None  # only timed records come here
        axes.barh(position, speedup - 1, left=1, color=DTYPE_COLOURS.get(case.dtypes, MUTED), height=0.68, alpha=0.9)
        axes.plot((p10, p90), (position, position), color=INK, linewidth=1.1, solid_capstyle="butt")
        text = axes.annotate(f"{speedup:.2f}", (max(p90, 1), position), (4, 0), textcoords="offset points")
        text.set(va="center", fontsize=7.5, color=INK)
    axes.axvline(1, color=INK, linewidth=1)
    axes.margins(x=0.12, y=0.01)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_yticks(range(len(section)), [case_label(case) if labels else "" for case in section])
    axes.set_ylim(len(section) - 0.4, -0.6)


def case_label(case: LinearCase) -> str:
    """`minilm.up  [1536x384]  bf16, p=0.1`."""
    dropout = f", p={case.dropout_p:g}" if case.dropout_p else ""
    tokens = f", M={case.M}" if case.M < 1024 else ""
    return f"{case.name}  [{case.N}x{case.K}]  {case.dtypes}{dropout}{tokens}"


def headline(figure: Figure, title: str, note: str) -> None:
    """Title and, in small print under it, where the numbers come from; both left-aligned above the panels."""
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, y=1.0, ha="left", va="bottom")
    figure.text(0.01, 0.995, note, fontsize=8, color=MUTED, ha="left", va="top")
    engine: Any = figure.get_layout_engine()  # the constrained one: every figure here asks for it
    engine.set(rect=(0, 0, 1, 1 - 0.3 / figure.get_size_inches()[1]))


def provenance(record: Record) -> str:
    """Machine, versions, rank and, in a checkout, the commit."""
    threads = "" if record.driver else f", {record.threads} threads"
    commit = f", commit {record.commit}" if record.commit else ""
    return f"{record.device}{threads}, torch {record.torch}, r = {record.R}{commit}"
