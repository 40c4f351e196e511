"""A run of `fastjepa bench data` as tables of text, and as one chart."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fastjepa.bench.data_results import Results, Way
from fastjepa.durable import atomic_file
from fastjepa.observe.tables import aligned

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def as_text(results: Results) -> str:
    """Everything: the setting, a row a way, the stages, wrong frames."""
    return "\n".join(_lines(results))


def _lines(results: Results) -> Iterator[str]:
    setting = results.setting
    versions = ", ".join(f"{name} {number}" for name, number in results.versions.items())
    yield f"{results.device['name']}; {versions}; commit {results.commit or 'unknown'}"
    if results.reference:
        yield f"official loader: {results.reference}"
    yield (
        f"{setting.files} files; clips of {setting.frames} frames at {setting.fps:g} a second, "
        f"{setting.crop} pixels, normalised; batches of {setting.batch}, {setting.workers} workers"
    )
    yield ""
    header = ["way", "clips/s", "of official", "clips/s a core", "CPU ms a clip", "memory"]
    if results.target is not None:
        header += [f"cores for {results.target:g} clips/s", "GPUs"]
    rows = [[*_cells(results, name, way)] for name, way in results.ways.items()]
    yield from aligned([[*header, "wrong frames"], *rows])
    yield ""
    yield "CPU time of a clip by PyAV, in one process:"
    total = sum(results.stages.values())
    table = [
        (name, f"{1e3 * seconds:.1f} ms", f"{seconds / total:.0%}")
        for name, seconds in results.stages.items()
    ]
    yield from aligned(table)
    for name, way in results.ways.items():
        for sentence in way.wrong_frames[:3]:
            yield f"{name}: {sentence}"


def _cells(results: Results, name: str, way: Way) -> Iterator[str]:
    share = way.cores_per_clip
    yield name
    yield _number(way.clips_per_second, ".2f")
    yield _number(results.over_official(name), ".2f")
    yield _number(share and 1.0 / share, ".2f")
    yield _number(share and 1e3 * share, ".0f")
    yield "" if way.worker_bytes is None else f"{way.worker_bytes / 1e6:.0f} MB"
    if results.target is not None:
        yield _number(results.cores_needed(name), ".1f")
        yield _number(results.devices_needed(name), ".1f")
    yield f"{len(way.wrong_frames)} of {way.frames_looked_at}" if way.frames_looked_at else ""


def draw(results: Results, picture: Path) -> None:
    """Draw clips a second by way, each turn a dot, and the stages of a clip, into a PNG.

    Atomically. Raises ValueError if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the chart needs {error.name}, which is not installed: pip install matplotlib"
        ) from error
    figure = Figure(figsize=(9.0, 2.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{results.device['name']}, {results.setting.workers} workers", fontsize=10)
    speed, stages = figure.subplots(1, 2)
    ways = {name: way for name, way in results.ways.items() if way.turns}
    for place, (name, way) in enumerate(ways.items()):
        rates = [turn.clips_per_second for turn in way.turns]
        colour = "#1f4e79" if name != "official" else "#9db8d2"
        speed.barh(place, way.clips_per_second or 0.0, height=0.6, color=colour)
        speed.plot(rates, [place] * len(rates), ".", color="#333333", markersize=4)
    speed.set_yticks(range(len(ways)), list(ways))
    speed.invert_yaxis()
    _plain(speed, "Clips a second")
    names = list(results.stages)
    stages.barh(names, [1e3 * results.stages[name] for name in names], height=0.6, color="#7a9e7e")
    stages.invert_yaxis()
    _plain(stages, "CPU milliseconds of a clip by PyAV")
    with atomic_file(picture) as handle:
        figure.savefig(handle, format="png")


def _plain(axes: "Axes", title: str) -> None:
    axes.set_title(title, fontsize=9, loc="left", color="#333333")
    axes.tick_params(labelsize=8, color="#999999")
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
