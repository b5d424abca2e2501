"""The pictures of a benchmark run: speed-up, cost over frozen, memory and roofline by case, and the fine-tuning.

python -m bench.plots FOLDER    # from the rows in it, such as a GPU's, where matplotlib was not installed
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench import providers
from bench.comparison import Found, ours, read_ceilings, times_faster
from bench.outcome import Outcome
from lora_kernels.benchmarking.cases import LinearCase
from lora_kernels.benchmarking.plot import INK, STYLE, case_label, headline, provenance
from lora_kernels.benchmarking.providers import FROZEN, UNFUSED
from lora_kernels.benchmarking.records import Record, read_csv
from lora_kernels.benchmarking.report import by_case, case_of
from lora_kernels.benchmarking.roofline import Ceilings, work

OURS, PATCHED, THEIRS, CONTROL = "#0f766e", "#2563a8", "#b45309", "#9aa5b1"
COLOURS = (
    CONTROL, THEIRS, "#2563a8", "#7c3aed", "#a78bfa", "#dc2626", "#f59e0b", "#db2777",
    OURS, "#14b8a6", "#84cc16", "#65a30d", "#4d7c0f", "#0e7490", "#164e63",
)  # fmt: skip
TICKS = (0.5, 0.8, 1, 1.2, 1.5, 2, 3, 4, 5)
WIDE = 8.0  # of ratios, from which on powers of ten say enough
CASES_SHOWN = 40  # more lines than that no one reads on a slide; the rows are in linear.csv


def linear(records: Sequence[Record], ceilings: Ceilings, out: Path) -> None:
    """The pictures of a run; one whose rows are missing is not drawn."""
    timed = {case: found for case, found in by_case(records).items() if FROZEN in found and found[FROZEN].timed}
    if not timed:
        return
    shown = dict(list(timed.items())[:CASES_SHOWN])
    for name, title, cases, names in (
        ("linear_training.png", "What LoRA costs in training, over the frozen linear",
         {case: found for case, found in shown.items() if case.backward},
         [p.name for p in (*providers.BASELINES, *providers.PEERS, providers.AUTO)]),
        ("linear_cost.png", "What the adapter costs over the frozen linear", shown, list(providers.NAMES)),
    ):  # fmt: skip
        if cases:
            _dots(
                cases,
                lambda found, r: r.cost,
                out / name,
                title=title,
                label="time / frozen linear's time",
                names=[name for name in names if name != FROZEN],
                one=True,
            )
    _dots(
        shown,
        lambda found, r: times_faster(r, mine) if (mine := ours(found)) else None,
        out / "linear_speedup.png",
        title="lora_kernels against each contender",
        label="contender's time / lora_kernels' time; right of 1 lora_kernels is faster",
        names=[name for name in providers.NAMES if name not in providers.OWN | {FROZEN}],
        one=True,
    )
    _dots(
        shown,
        lambda found, r: None if r.peak_bytes is None else r.peak_bytes / 2**20,
        out / "linear_memory.png",
        title="The most that one call allocates",
        label="MiB",
        names=list(providers.NAMES),
        one=False,
    )
    _roofline(records, ceilings, out / "linear_roofline.png")


def _dots(
    cases: Mapping[LinearCase, Found],
    value: Callable[[Found, Record], float | None],
    path: Path,
    *,
    title: str,
    label: str,
    names: Sequence[str],
    one: bool,
) -> None:
    """A case a line, a contender a colour."""
    first = next(iter(next(iter(cases.values())).values()))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8.6, 1.6 + 0.24 * len(cases)), layout="constrained")
        for name in names:
            points = [
                (number, position)
                for position, found in enumerate(cases.values())
                if name in found and found[name].timed and (number := value(found, found[name])) is not None
            ]
            if points:
                colour = COLOURS[providers.NAMES.index(name) % len(COLOURS)]
                own = name in providers.OWN
                axes.scatter(
                    *zip(*points, strict=True),
                    s=34 if own else 24,
                    marker="D" if own else "o",
                    color=colour,
                    label=name,
                )
        if one:
            axes.axvline(1, color=INK, linewidth=1)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda number, _: f"{number:g}")
        if one and axes.get_xlim()[1] < WIDE:
            low, high = axes.get_xlim()
            axes.set_xticks([tick for tick in TICKS if low <= tick <= high])
            axes.set_xticks([], minor=True)
        else:
            axes.xaxis.set_minor_formatter(lambda number, _: f"{number:g}" if one and number < 3 else "")
        axes.set_yticks(range(len(cases)), [f"{case_label(case)}, {case.mode}" for case in cases])
        axes.set_ylim(len(cases) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(label)
        if axes.get_legend_handles_labels()[1]:
            figure.legend(loc="outside lower center", ncols=4)
        headline(figure, title, provenance(first))
        _save(figure, path)


def _roofline(records: Sequence[Record], ceilings: Ceilings, path: Path) -> None:
    """Rate reached over operations per byte of the case, forward cases and training cases alike, under the ceilings."""
    shown = [r for r in records if r.timed and r.provider in (FROZEN, UNFUSED, providers.AUTO.name)]
    if not shown:
        return
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8.6, 5), layout="constrained")
        for name, colour in ((FROZEN, CONTROL), (UNFUSED, THEIRS), (providers.AUTO.name, OURS)):
            points = []
            for record in shown:
                if record.provider == name and record.median_ms:
                    operations, moved = work(case_of(record), has_lora=name != FROZEN)
                    points.append((operations / moved, operations / record.median_ms / 1e9))
            if points:
                axes.scatter(*zip(*points, strict=True), s=20, color=colour, label=name, zorder=3)
        peaks: dict[float, list[str]] = {}
        for dtype in dict.fromkeys(record.dtype for record in shown):
            if dtype in ceilings.gemm_tflops:
                peaks.setdefault(ceilings.tflops(dtype), []).append(dtype)
        for peak, dtypes in peaks.items():
            slope = ceilings.copy_gb_s / 1e3
            reach = [0.5, peak / slope, max(20 * peak / slope, 5000)]
            axes.plot(reach, [min(peak, slope * x) for x in reach], color=INK, linewidth=0.9)
            text = axes.annotate(", ".join(dtypes), (reach[-1], peak), (-4, 3), textcoords="offset points")
            text.set(ha="right", fontsize=8)
        axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOP/s")
        figure.legend(loc="outside lower center", ncols=3)
        headline(figure, "Under the ceilings measured on this device", provenance(shown[0]))
        _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def finetune(outcome: Outcome, path: Path) -> None:
    """The loss curves on top of each other, how far they stray, and the bars of step time and memory."""
    peft, twin, *ours = outcome.losses
    shown = [peft, *ours]
    colours = dict(zip(shown, (THEIRS, PATCHED, OURS), strict=True))
    with plt.rc_context(STYLE):
        figure, panels = plt.subplot_mosaic(
            [["loss", "loss", "loss"], ["stray", "stray", "stray"], ["step", "peak", "kept"]],
            figsize=(8.6, 7.6),
            gridspec_kw={"height_ratios": (2.3, 1.5, 1.2)},
            layout="constrained",
        )
        steps = range(1, len(outcome.losses[peft]) + 1)
        loss = panels["loss"]
        loss.plot(steps, outcome.losses[peft], color=THEIRS, linewidth=5, alpha=0.45, label=peft)
        styles = dict(zip(ours, ("-", (0, (4, 3))), strict=True))  # curves that lie on each other are both seen
        for arm in ours:
            loss.plot(steps, outcome.losses[arm], color=colours[arm], linestyle=styles[arm], linewidth=1.6, label=arm)
        loss.set(ylabel="training loss", ylim=(0, None), title="Loss: same start, same batches")
        # Above the panels: inside, every corner is a place where a curve may run.
        above = {"loc": "lower right", "bbox_to_anchor": (1.0, 0.98), "ncols": 4, "fontsize": 8, "borderaxespad": 0.2}
        loss.legend(**above)
        stray = panels["stray"]
        for arm in (twin, *ours):
            # Steps at which the curves coincide to the last bit have no place on a logarithmic axis.
            points = [(step, value) for step, value in zip(steps, outcome.strayed(arm), strict=True) if value > 0]
            drawn = zip(*points, strict=True) if points else ((), ())
            style = {"color": colours.get(arm, CONTROL), "linestyle": styles.get(arm, "-")}
            stray.plot(*drawn, **style, linewidth=1.4, label=arm)
        if outcome.asserted:
            stray.axhline(outcome.tolerance, color=INK, linewidth=0.9, linestyle="--", label="allowed")
        stray.set(yscale="log", xlabel="step", title="Relative distance from peft's loss")
        stray.legend(**above)
        stray.sharex(loss)
        spread = {arm: outcome.times.time(arm) for arm in shown}
        _bars(panels["step"], {arm: spread[arm].median for arm in shown}, colours, "Step time, ms")
        for position, arm in enumerate(shown):
            panels["step"].plot((spread[arm].p10, spread[arm].p90), (position, position), color=INK, linewidth=1.1)
        _bars(panels["peak"], {arm: outcome.peak[arm] / 2**20 for arm in shown}, colours, "Peak memory, MiB")
        _bars(panels["kept"], {arm: outcome.saved[arm] / 2**20 for arm in shown}, colours, "Kept for backward, MiB")
        panels["peak"].set_yticklabels([])
        panels["kept"].set_yticklabels([])
        environment = outcome.environment
        threads = "" if environment.driver else f", {environment.threads} threads"
        note = f"{outcome.title}; {environment.device}{threads}, torch {environment.torch}, peft {environment.peft}"
        headline(figure, "Fine-tuning with LoRA: stock PEFT, patch_peft and add_lora", note)
        _save(figure, path)


def _bars(axes: Axes, values: Mapping[str, float], colours: Mapping[str, str], title: str) -> None:
    places = range(len(values))
    axes.barh(places, values.values(), color=[colours[arm] for arm in values], height=0.66, alpha=0.9)
    for position, value in enumerate(values.values()):
        inside = axes.annotate(f"{value:.0f}", (0, position), (6, 0), textcoords="offset points")
        inside.set(va="center", color="white", fontweight="bold", fontsize=9)
    axes.set_yticks(places, values)
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_title(title)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plots", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="with linear.csv and run.json; the pictures go there, too")
    folder = parser.parse_args(argv).folder
    linear(read_csv(folder / "linear.csv", Record), read_ceilings(folder / "run.json"), folder)


if __name__ == "__main__":
    main()
