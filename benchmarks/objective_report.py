"""The figures of objective_ablation.py as a table and as curves over training."""

import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from fastjepa.durable import atomic_file


class Measure(NamedTuple):
    """A figure of a level, and what is got by chance or by always saying the same."""

    title: str
    level: str
    key: str
    without: float | None = None


MEASURES = (
    Measure("mIoU, last level", "last", "miou"),
    Measure("mIoU, intermediate level", "intermediate", "miou"),
    Measure("mIoU of a picture, last level", "last", "miou_picture"),
    Measure("mIoU of a picture, intermediate level", "intermediate", "miou_picture"),
    Measure("k-NN, last level", "last", "knn", 0.1),
    Measure("k-NN, intermediate level", "intermediate", "knn", 0.1),
    Measure("velocity R2, last level", "last", "velocity_r2", 0.0),
    Measure("velocity R2, intermediate level", "intermediate", "velocity_r2", 0.0),
)
_COLOURS = ("#8c8c8c", "#1f4e79", "#e0a458", "#7a9e7e")


def as_markdown(found: dict[str, Any]) -> str:
    """Two tables: rows are measures, a column an objective; mean of the seeds, lowest to highest.

    The second one has each objective less the one before it, seed by seed.
    """
    runs, last = found["runs"], str(found["steps"])
    names = list(runs)
    figures = [["", "untrained", *names]]
    gains = [["", *(f"{name} less {before}" for before, name in pairwise(names))]]
    for measure in MEASURES:
        of = {name: _values(runs[name], measure, last) for name in names}
        untrained = _values(runs[names[0]], measure, "0")
        figures.append([measure.title, *(_spread(v) for v in (untrained, *of.values()))])
        steps = [
            [b - a for a, b in zip(of[one], of[other], strict=True)]
            for one, other in pairwise(names)
        ]
        gains.append([measure.title, *(_spread(gain, "+") for gain in steps)])
    return f"{_table(figures)}\n{_table(gains)}"


def _spread(values: list[float], sign: str = "") -> str:
    low, mean, high = (
        f"{value:{sign}.3f}" for value in (min(values), statistics.mean(values), max(values))
    )
    return f"{mean} ({low} to {high})"


def _table(rows: list[list[str]]) -> str:
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _values(seeds: dict[str, Any], measure: Measure, step: str) -> list[float]:
    """Of every seed that has got so far."""
    return [run[step][measure.level][measure.key] for run in seeds.values() if step in run]


def draw(found: dict[str, Any], picture: Path) -> None:
    """A panel a measure: a line for each objective's mean over seeds, a dot for each seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 6.0), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for place, measure in enumerate(MEASURES):
        column, row = divmod(place, 2)
        axes = figure.add_subplot(2, 4, 1 + column + 4 * row)
        for (name, seeds), colour in zip(found["runs"].items(), _COLOURS, strict=False):
            steps = sorted({int(step) for run in seeds.values() for step in run})
            values = [_values(seeds, measure, str(step)) for step in steps]
            means = [statistics.mean(of_step) for of_step in values]
            axes.plot(steps, means, color=colour, linewidth=1.8, label=name)
            dots = [(step, v) for step, of_step in zip(steps, values, strict=True) for v in of_step]
            axes.plot(*zip(*dots, strict=True), ".", color=colour, markersize=4, alpha=0.6)
        if measure.without is not None:
            axes.axhline(measure.without, color="#333333", linewidth=0.8, linestyle=":")
        axes.set_title(measure.title, fontsize=9, loc="left", color="#333333")
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8, color="#999999")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    with atomic_file(picture) as handle:
        figure.savefig(handle, format="png")
