"""Curves of a run from its metrics.jsonl, as one PNG: losses, their terms by level, and health."""

from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fastjepa.durable import atomic_file
from fastjepa.observe.sinks import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = list[dict[str, float]]

# Above so many points the curve is a running mean over a light trace of the points.
_MANY = 80


class _Panel(NamedTuple):
    """One set of axes: `metric`, or a line for each `metric/levelN` that was logged.

    `by_stream` draws a line for each `metric/STREAM` and nothing else.
    """

    metric: str
    title: str
    unit: str
    measured: bool = True
    by_stream: bool = False


_PANELS = (
    _Panel("loss", "Summed loss", "loss"),
    _Panel("loss", "Summed loss, by stream", "loss", by_stream=True),
    _Panel("loss_predict", "Loss on predicted tokens, by level", "loss"),
    _Panel("loss_context", "Loss on context tokens, by level", "loss"),
    _Panel("context_weight", "Weight of the context loss", "lambda", measured=False),
    _Panel("feature_std", "Feature std over tokens, by level", "std"),
    _Panel("effective_rank", "Effective rank of features, by level", "rank"),
    _Panel("probe_r2", "Where a digit is, by a linear map, by level", "R2", measured=False),
    _Panel("probe_knn", "k-NN accuracy, by level", "share", measured=False),
)


def loss_curve(metrics: Path, picture: Path, title: str = "") -> None:
    """Draw `metrics` (a metrics.jsonl) into the PNG `picture`, atomically.

    Panels whose metric was not logged are left out. Raises ValueError naming the file when no
    logged step holds a loss, FileNotFoundError when there is no file, ValueError when matplotlib
    is not installed.
    """
    rows = read_metrics(metrics)
    panels = [p for p in _PANELS if _lines(rows, p)]
    if not any(p.metric == "loss" for p in panels):
        raise ValueError(f"{metrics}: no logged step holds a finite `loss`, nothing to draw")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the curves need {error.name}, which is not installed: pip install matplotlib"
        ) from error
    columns = min(3, len(panels))
    depth = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.1 * depth + 0.3), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, fontsize=11, color="#333333")
    for place, panel in enumerate(panels, start=1):
        _draw(figure.add_subplot(depth, columns, place), panel, _lines(rows, panel))
    with atomic_file(picture) as handle:
        figure.savefig(handle, format="png")


def _lines(rows: Rows, panel: _Panel) -> dict[str, tuple[list[float], list[float]]]:
    """Points by label, shallowest level first; empty where nothing finite was logged."""
    front = f"{panel.metric}/" if panel.by_stream else f"{panel.metric}/level"
    keys = list(dict.fromkeys(k for row in rows for k in row if k.startswith(front)))
    labels = {key: key.removeprefix(front) for key in keys}
    if not panel.by_stream:
        keys = sorted(keys, key=lambda key: int(labels[key])) or [panel.metric]
        labels = {key: f"block {label}" for key, label in labels.items()} | {panel.metric: ""}
    lines = {}
    for key in keys:
        points = [(row["step"], row[key]) for row in rows if key in row and isfinite(row[key])]
        if points:
            lines[labels[key]] = ([x for x, _ in points], [y for _, y in points])
    return lines


def _draw(axes: "Axes", panel: _Panel, lines: dict[str, tuple[list[float], list[float]]]) -> None:
    from matplotlib import colormaps

    shades = colormaps["viridis_r"]
    for index, (label, (steps, values)) in enumerate(lines.items()):
        colour = "#1f4e79" if len(lines) == 1 else shades(0.15 + 0.8 * index / (len(lines) - 1))
        mark = "." if len(steps) == 1 else ""
        if panel.measured and len(steps) > _MANY:
            axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.3)
            values = _running_mean(values, len(values) // 40)
        axes.plot(steps, values, color=colour, linewidth=1.6, marker=mark, label=label)
    if not panel.measured:
        axes.set_ylim(bottom=0.0)
    axes.set_title(panel.title, fontsize=10, loc="left", color="#333333")
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel(panel.unit, fontsize=9)
    axes.tick_params(labelsize=8, color="#999999")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#999999")
    if len(lines) > 1:
        axes.legend(fontsize=8, frameon=False, ncols=2)


def _running_mean(values: list[float], width: int) -> list[float]:
    """Mean over `width` points to either side, fewer at the ends."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    ends = [(max(0, i - width), min(len(values), i + width + 1)) for i in range(len(values))]
    return [(sums[high] - sums[low]) / (high - low) for low, high in ends]
