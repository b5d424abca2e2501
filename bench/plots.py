"""The pictures of a benchmark run. Bars start at 1.0, where nothing is gained; whiskers are 10th to 90th percentile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.providers import FROZEN, UNFUSED
from lora_kernels.benchmarking.cases import MODES, LinearCase
from lora_kernels.benchmarking.records import Record
from lora_kernels.benchmarking.report import by_case

if TYPE_CHECKING:
    from bench.finetune import Outcome

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
OURS, THEIRS, CONTROL = "#0f766e", "#b45309", "#9aa5b1"
DTYPE_COLOURS = {"fp32": "#2563a8", "bf16": "#0f766e", "bf16+fp32": "#7c3aed", "fp16": "#b45309"}

STYLE = {
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


def speedups(records: Sequence[Record], path: Path) -> None:
    """Time of the unfused chain over time of each fused backend: one column per backend, one panel per mode."""
    timed = [r for r in records if r.speedup is not None and r.provider not in (FROZEN, UNFUSED)]
    if not timed:
        return
    providers = list(dict.fromkeys(r.provider for r in timed))
    modes = [mode for mode in reversed(MODES) if any(r.mode == mode for r in timed)]
    heights = [len({r for r in timed if r.mode == mode and r.provider == providers[-1]}) for mode in modes]
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            len(modes),
            len(providers),
            squeeze=False,
            sharex=True,
            figsize=(3.2 + 4.6 * len(providers), 1.6 + 0.24 * sum(heights)),
            gridspec_kw={"height_ratios": heights},
            layout="constrained",
        )
        for row, mode in zip(grid, modes, strict=True):
            for axes, provider in zip(row, providers, strict=True):
                found = [r for r in timed if r.mode == mode and r.provider == provider]
                _speedup_panel(axes, found, labels=provider == providers[0])
                axes.set_title(f"{mode}, {provider} backend")
        for axes in grid[-1]:
            axes.set_xlabel("times as fast as the unfused chain")
        used = dict.fromkeys(_case(r).dtypes for r in timed)
        handles = [plt.Rectangle((0, 0), 1, 1, color=DTYPE_COLOURS.get(name, MUTED)) for name in used]
        figure.legend(handles, used, loc="outside lower center", ncols=len(used))
        _headline(figure, "LoRA linear against the unfused chain", _provenance(records[0]))
        _save(figure, path)


def _speedup_panel(axes: Axes, records: Sequence[Record], *, labels: bool) -> None:
    for position, record in enumerate(records):
        speedup, p10, p90 = record.speedup, record.speedup_p10, record.speedup_p90
        assert speedup is not None and p10 is not None and p90 is not None  # only timed records come here
        colour = DTYPE_COLOURS.get(_case(record).dtypes, MUTED)
        axes.barh(position, speedup - 1, left=1, color=colour, height=0.68, alpha=0.9)
        axes.plot((p10, p90), (position, position), color=INK, linewidth=1.1, solid_capstyle="butt")
        text = axes.annotate(f"{speedup:.2f}", (max(p90, 1), position), (4, 0), textcoords="offset points")
        text.set(va="center", fontsize=7.5, color=INK)
    axes.axvline(1, color=INK, linewidth=1)
    axes.margins(x=0.12, y=0.01)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_yticks(range(len(records)), [_label(r) for r in records] if labels else [""] * len(records))
    axes.set_ylim(len(records) - 0.4, -0.6)


def saved_bytes(records: Sequence[Record], path: Path) -> None:
    """What forward keeps for backward beyond x and the parameters, where dropout or fp32 adapters make a difference."""
    training = {case: found for case, found in by_case(records).items() if case.backward}
    telling = {case.name for case in training if case.dropout_p or case.adapter_dtype != case.dtype}
    shown = [
        (case, found)
        for case, found in sorted(training.items(), key=lambda item: item[0].name)
        if case.name in telling and UNFUSED in found
    ]
    if not shown:
        return
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.6, 1.3 + 0.5 * len(shown)), layout="constrained")
        for position, (_, found) in enumerate(shown):
            ours = next(r for r in found.values() if r.provider not in (FROZEN, UNFUSED) and r.saved_bytes is not None)
            pairs = ((-0.19, found[UNFUSED], THEIRS), (0.19, ours, OURS))
            for offset, record, colour in pairs:
                size = (record.saved_bytes or 0) / 2**20
                axes.barh(position + offset, size, height=0.36, color=colour)
                text = axes.annotate(f"{size:.2f}", (size, position + offset), (4, 0), textcoords="offset points")
                text.set(va="center", fontsize=7.5)
        axes.set_yticks(range(len(shown)), [_label_of(case) for case, _ in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.1)
        axes.set_xlabel("MiB kept for backward, beyond x and the parameters")
        handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in (THEIRS, OURS)]
        figure.legend(handles, ("unfused chain", "lora_kernels"), loc="outside lower center", ncols=2)
        _headline(figure, "Kept for backward by one LoRA linear", _provenance(records[0]))
        _save(figure, path)


def _case(record: Record) -> LinearCase:
    return next(iter(by_case([record])))


def _label(record: Record) -> str:
    return _label_of(_case(record))


def _label_of(case: LinearCase) -> str:
    dropout = f", p={case.dropout_p:g}" if case.dropout_p else ""
    tokens = f", M={case.M}" if case.M < 1024 else ""
    return f"{case.name}  [{case.N}x{case.K}]  {case.dtypes}{dropout}{tokens}"


def _headline(figure: Figure, title: str, note: str) -> None:
    """Title and, in small print under it, where the numbers come from; both left-aligned above the panels."""
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, y=1.0, ha="left", va="bottom")
    figure.text(0.01, 0.995, note, fontsize=8, color=MUTED, ha="left", va="top")
    engine = figure.get_layout_engine()
    assert engine is not None  # every figure here asks for the constrained layout
    engine.set(rect=(0, 0, 1, 1 - 0.3 / figure.get_size_inches()[1]))


def _provenance(record: Record) -> str:
    threads = "" if record.driver else f", {record.threads} threads"
    return f"{record.device}{threads}, torch {record.torch}, r = {record.R}, commit {record.commit or 'unknown'}"


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def finetune(outcome: Outcome, path: Path) -> None:
    """Two loss curves on top of each other, how far they stray, and the bars of step time and memory."""
    unfused, twin, ours = outcome.losses
    with plt.rc_context(STYLE):
        figure, panels = plt.subplot_mosaic(
            [["loss", "loss", "loss"], ["stray", "stray", "stray"], ["step", "peak", "kept"]],
            figsize=(8.6, 7.4),
            gridspec_kw={"height_ratios": (2.4, 1.5, 1.0)},
            layout="constrained",
        )
        steps = range(1, len(outcome.losses[unfused]) + 1)
        loss = panels["loss"]
        loss.plot(steps, outcome.losses[unfused], color=THEIRS, linewidth=4.5, alpha=0.45, label="unfused layer")
        loss.plot(steps, outcome.losses[ours], color=OURS, linewidth=1.3, label="lora_kernels")
        loss.set(ylabel="training loss", ylim=(0, None), title="Loss: same start, same batches")
        # Above the panels: inside, every corner is a place where a curve may run.
        above = {"loc": "lower right", "bbox_to_anchor": (1.0, 0.98), "ncols": 3, "fontsize": 8, "borderaxespad": 0.2}
        loss.legend(**above)
        stray = panels["stray"]
        for arm, colour, label in ((twin, CONTROL, "unfused, weights 1 ulp off"), (ours, OURS, "lora_kernels")):
            # Steps at which the curves coincide to the last bit have no place on a logarithmic axis.
            points = [(step, value) for step, value in zip(steps, outcome.strayed(arm), strict=True) if value > 0]
            stray.plot(*zip(*points, strict=True) if points else ((), ()), color=colour, linewidth=1.4, label=label)
        if outcome.asserted:
            stray.axhline(outcome.tolerance, color=INK, linewidth=0.9, linestyle="--", label="allowed")
        stray.set(yscale="log", xlabel="step", title="Relative distance from the unfused loss")
        stray.legend(**above)
        stray.sharex(loss)
        spread = {arm: outcome.times.time(arm) for arm in (unfused, ours)}
        _pair(panels["step"], [spread[unfused].median, spread[ours].median], "Step time, ms", "{:.0f}")
        for position, arm in enumerate((unfused, ours)):
            panels["step"].plot((spread[arm].p10, spread[arm].p90), (position, position), color=INK, linewidth=1.1)
        _pair(panels["peak"], [outcome.peak[arm] / 2**20 for arm in (unfused, ours)], "Peak memory, MiB", "{:.0f}")
        _pair(
            panels["kept"], [outcome.saved[arm] / 2**20 for arm in (unfused, ours)], "Kept for backward, MiB", "{:.0f}"
        )
        panels["peak"].set_yticklabels([])
        panels["kept"].set_yticklabels([])
        environment = outcome.environment
        threads = "" if environment.driver else f", {environment.threads} threads"
        note = f"{outcome.title}; {environment.device}{threads}, torch {environment.torch}"
        _headline(figure, "Fine-tuning with LoRA: unfused layer and lora_kernels", note)
        _save(figure, path)


def _pair(axes: Axes, values: Sequence[float], title: str, form: str) -> None:
    axes.barh((0, 1), values, color=(THEIRS, OURS), height=0.62, alpha=0.9)
    for position, value in enumerate(values):
        inside = axes.annotate(form.format(value), (0, position), (6, 0), textcoords="offset points")
        inside.set(va="center", color="white", fontweight="bold", fontsize=9)
    axes.set_yticks((0, 1), ("unfused layer", "lora_kernels"))
    axes.set_ylim(1.5, -0.5)
    axes.set_title(title)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
