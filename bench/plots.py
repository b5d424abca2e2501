"""The pictures of a benchmark run besides the speed-ups: bytes kept for backward, and the fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_kernels.benchmarking.plot import INK, STYLE, case_label, headline, provenance
from lora_kernels.benchmarking.providers import FROZEN, UNFUSED
from lora_kernels.benchmarking.records import Record
from lora_kernels.benchmarking.report import by_case

if TYPE_CHECKING:
    from bench.finetune import Outcome

OURS, THEIRS, CONTROL = "#0f766e", "#b45309", "#9aa5b1"


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
        axes.set_yticks(range(len(shown)), [case_label(case) for case, _ in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.1)
        axes.set_xlabel("MiB kept for backward, beyond x and the parameters")
        handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in (THEIRS, OURS)]
        figure.legend(handles, ("unfused chain", "lora_kernels"), loc="outside lower center", ncols=2)
        headline(figure, "Kept for backward by one LoRA linear", provenance(records[0]))
        _save(figure, path)


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
        headline(figure, "Fine-tuning with LoRA: unfused layer and lora_kernels", note)
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
