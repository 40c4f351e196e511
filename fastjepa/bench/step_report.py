"""The figures of `fastjepa bench step` as text and as a picture."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fastjepa.bench.report import provenance
from fastjepa.bench.step_results import OFFICIAL, Point, Side, StepResults
from fastjepa.durable import atomic_file
from fastjepa.observe.tables import aligned

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = (
    "#1f4e79", "#4f81b0", "#9db8d2", "#e0a458", "#7a9e7e", "#b5651d", "#8a6f9e", "#c9c9c9",
)  # fmt: skip


def as_text(results: StepResults) -> str:
    """Everything, one block a point."""
    return "\n".join(_lines(results))


def _lines(results: StepResults) -> Iterator[str]:
    yield provenance(results.device, results.versions, results.commit)
    if results.reference:
        yield f"official code at {results.reference}"
    for point in results.points:
        yield ""
        yield from _point_lines(point)


def _point_lines(point: Point) -> Iterator[str]:
    yield _title(point)
    groups = zip(point.context, point.predicted, strict=True)
    kept = ", ".join(f"{context:.0f} + {predicted:.0f}" for context, predicted in groups)
    yield f"{point.tokens} tokens a clip; context + predicted by mask group: {kept}"
    flops = ", ".join(f"{part} {value / 1e9:.1f}" for part, value in point.flops.items())
    yield f"{point.total_flops / 1e9:.1f} GFLOP a step: {flops}"
    rates = ", ".join(
        f"{dtype} {best / 1e9:.0f} GFLOP/s at its best, {point.held_rates[dtype] / 1e9:.0f} held"
        for dtype, best in point.matrix_rates.items()
    )
    yield f"large matrix product: {rates}; a batch is loaded in {point.data:.3f} s by one process"
    header = ("side", "dtype", "step, s", "clips/s", "MFU", "held", "peak, MiB", "MiB a clip",
              "CPU, s", "time", "CPU", "memory", "loss")  # fmt: skip
    rows = [_cells(point, name, side) for name, side in point.sides.items()]
    yield from aligned([header, *rows])
    stages = list(next(iter(point.sides.values())).stages)
    rows = [
        (name, *(f"{side.stages[stage]:.3f}" for stage in stages))
        for name, side in point.sides.items()
    ]
    yield from aligned([("stages, s", *stages), *rows])
    rows = [
        (name, str(own.operations), f"{own.bytes / 2**30:.2f}",
         "not counted" if own.kernels is None else str(own.kernels))
        for name, side in point.sides.items()
        if (own := side.counted) is not None
    ]  # fmt: skip
    yield from aligned([("counted", "operations", "GiB moved", "kernels"), *rows])


def _cells(point: Point, name: str, side: Side) -> tuple[str, ...]:
    per_clip, memory = point.memory_per_clip(name), side.memory
    cells = (
        name, side.dtype, f"{side.seconds:.3f}", f"{point.clips_per_second(name):.3g}",
        f"{point.utilisation(name):.1%}", f"{point.utilisation(name, held=True):.1%}",
        "" if memory is None else f"{memory.peak / 2**20:.0f}",
        "" if per_clip is None else f"{per_clip / 2**20:.0f}",
        f"{statistics.median(side.processor):.3f}",
    )  # fmt: skip
    if OFFICIAL not in point.sides or name == OFFICIAL:
        return (*cells, "", "", "", "")
    ratio = point.memory_ratio(name, OFFICIAL)
    return (
        *cells, f"{point.time_ratio(name, OFFICIAL):.3f}",
        f"{point.processor_ratio(name, OFFICIAL):.3f}",
        "" if ratio is None else f"{ratio:.3f}",
        f"{point.loss_difference(name, OFFICIAL):.1e}",
    )  # fmt: skip


def _title(point: Point) -> str:
    clips = "images" if point.frames == 1 else f"clips of {point.frames} frames"
    title = f"{point.model}, {point.batch} {clips}, {point.crop} px"
    changes = " ".join(f"{key}={value}" for key, value in point.changes.items())
    return f"{title} ({changes})" if changes else title


def draw(results: StepResults, picture: Path) -> None:
    """Stages and peak memory of every side at every point into the PNG `picture`, atomically.

    Raises ValueError if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the chart needs {error.name}, which is not installed: pip install matplotlib"
        ) from error
    rows = [(point, name) for point in results.points for name in point.sides]
    figure = Figure(figsize=(12, 0.42 * len(rows) + 1.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(results.device["name"], fontsize=10)
    time, memory = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    _draw_stages(time, rows)
    peaks = [point.sides[name].memory for point, name in rows]
    memory.barh(
        range(len(rows)), [0 if m is None else m.peak / 2**30 for m in peaks], color=_COLOURS[1]
    )
    memory.set_title("Peak memory, GiB", fontsize=9, loc="left")
    time.set_yticks(
        range(len(rows)), [f"{_title(point)}\n{name}" for point, name in rows], fontsize=7
    )
    time.invert_yaxis()
    for axes in (time, memory):
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.legend(loc="outside lower center", ncols=8, fontsize=8, frameon=False)
    with atomic_file(picture) as handle:
        figure.savefig(handle, format="png")


def _draw_stages(axes: "Axes", rows: list[tuple[Point, str]]) -> None:
    """A step's stages behind one another, scaled to the median step."""
    stages = list(rows[0][0].sides[rows[0][1]].stages)
    left = [0.0] * len(rows)
    for stage, colour in zip(stages, _COLOURS, strict=True):
        widths = []
        for point, name in rows:
            side = point.sides[name]
            widths.append(side.stages[stage] / sum(side.stages.values()) * side.seconds)
        axes.barh(range(len(rows)), widths, left=left, color=colour, label=stage)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_title("Step, s", fontsize=9, loc="left")
