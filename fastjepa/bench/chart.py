"""A run's results as one PNG: time and memory of ours over each other way, and, from a GPU, the
share of the copy bandwidth."""

from pathlib import Path
from typing import TYPE_CHECKING

from fastjepa.bench.results import Results, Row
from fastjepa.durable import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"formula": "#9db8d2", "compiled": "#e0a458", "official": "#1f4e79"}
_OTHER = "#7a9e7e"
# A bar ends here, where ours needs next to nothing.
_LEAST = 1e-3


def draw(results: Results, picture: Path) -> None:
    """Draw what was measured into the PNG `picture`, atomically.

    Raises ValueError if nothing was measured or matplotlib is not installed.
    """
    ops = list(dict.fromkeys(row.op for row in results.rows))
    rows = [row for row in results.rows if row.bandwidth("ours") is not None]
    rows.sort(key=lambda row: ops.index(row.op))
    if not rows:
        raise ValueError(f"{picture}: nothing was measured, nothing to draw")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the chart needs {error.name}, which is not installed: pip install matplotlib"
        ) from error
    on_gpu = results.device["type"] == "cuda"
    figure = Figure(
        figsize=(4.2 * (2 + on_gpu) + 1.8, 0.62 * len(rows) + 1.6), dpi=110, layout="constrained"
    )
    FigureCanvasAgg(figure)
    figure.suptitle(results.device["name"], fontsize=10)
    axes = figure.subplots(1, 2 + on_gpu, sharey=True, squeeze=False)[0]
    ratios = [{w: r.time_ratio(w) for w in r.ways if w != "ours"} for r in rows]
    _ratio_panel(axes[0], ratios, "Time of ours / time of")
    ratios = [{w: r.memory_ratio(w) for w in r.ways if w != "ours"} for r in rows]
    _ratio_panel(axes[1], ratios, "Peak extra memory of ours / that of")
    if on_gpu:
        _share_panel(axes[2], rows, results.copy_bytes_per_second)
    axes[0].set_yticks(range(len(rows)), [f"{row.op}\n{row.shape}" for row in rows], fontsize=8)
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    with atomic_file(picture) as handle:
        figure.savefig(handle, format="png")


def _ratio_panel(axes: "Axes", ratios: list[dict[str, float | None]], title: str) -> None:
    """Bars from 1 on a log scale; to the left, ours needs less."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ways = list(dict.fromkeys(way for row in ratios for way in row))
    height = 0.8 / len(ways)
    for number, way in enumerate(ways):
        points = {
            place: max(_LEAST, ratio)
            for place, ratio in enumerate(row.get(way) for row in ratios)
            if ratio is not None
        }
        axes.barh(
            [place - 0.4 + height * (number + 0.5) for place in points],
            [ratio - 1.0 for ratio in points.values()], left=1.0,
            height=0.9 * height, color=_COLOURS.get(way, _OTHER), label=way,
        )  # fmt: skip
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1e2 else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1.0, color="#333333", linewidth=0.8)
    _plain(axes, f"{title} ...")


def _share_panel(axes: "Axes", rows: list[Row], copy: float) -> None:
    shares = [100 * (row.bandwidth("ours") or 0.0) / copy for row in rows]
    axes.barh(range(len(rows)), shares, height=0.6, color="#1f4e79")
    _plain(axes, "Share of copy bandwidth, %")


def _plain(axes: "Axes", title: str) -> None:
    axes.set_title(title, fontsize=9, loc="left", color="#333333")
    axes.tick_params(labelsize=8, color="#999999")
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
