"""A run's results as tables of text: figures by op, launches, and the comparison with an older
run."""

from collections.abc import Iterator, Mapping
from math import isnan
from typing import Any

from fastjepa.bench.results import Figure, Results, Row, compared
from fastjepa.observe.tables import aligned

# What the official code launches, counted on it at ViT-L, 256 px, 16 frames, batch 48; not here.
OFFICIAL_LAUNCHES = {
    "rope3d": "about 104 of the 126 kernels of a block's forward",
    "dense_l1": "86 kernels that move 74 GiB",
    "mask_distance": "about 8,000 a step, 95,000 at 384 px and 64 frames",
}
_HEADER = (
    "shape", "way", "time", "least", "GB/s", "of copy", "peak extra", "ours/it: time", "memory",
    "kernels",
)  # fmt: skip


def as_text(results: Results) -> str:
    """Everything, one block an op."""
    return "\n".join(_lines(results))


def provenance(device: Mapping[str, Any], versions: Mapping[str, str], commit: str) -> str:
    """The first line of a report: what its figures are from."""
    threads = f", {device['threads']} threads" if "threads" in device else ""
    named = ", ".join(f"{name} {number}" for name, number in versions.items())
    return f"{device['name']}{threads}; {named}; commit {commit or 'unknown'}"


def _lines(results: Results) -> Iterator[str]:
    device = results.device
    yield provenance(device, results.versions, results.commit)
    yield f"copy bandwidth {results.copy_bytes_per_second / 1e9:.1f} GB/s, read and written"
    if device["type"] != "cuda":
        yield "(a CPU reads what a copy overwrites, too, so updates in place can exceed it)"
    yield f"official way: {results.official}"
    yield "least: bytes read and written once, and operations of products; GB/s are those bytes"
    for op in dict.fromkeys(row.op for row in results.rows):
        rows = [row for row in results.rows if row.op == op]
        yield ""
        yield f"{op}: {rows[0].measures}"
        table = [cells for row in rows for cells in _cells(row, results.copy_bytes_per_second)]
        yield from aligned([_HEADER, *table])
    yield from _launch_lines(results)


def _cells(row: Row, copy: float) -> Iterator[tuple[str, ...]]:
    least = _size(row.bytes) + (f", {row.flops / 1e9:.1f} GFLOP" if row.flops else "")
    if not row.ways:
        yield row.shape, "", "not measured", least, *("",) * 6
    for number, (way, figure) in enumerate(row.ways.items()):
        bandwidth = row.bandwidth(way)
        yield (
            "" if number else row.shape,
            way,
            _time(figure),
            "" if number else least,
            _number(bandwidth and bandwidth / 1e9, ".1f"),
            _number(bandwidth and bandwidth / copy, ".1%"),
            "" if figure.peak_extra_bytes is None else _size(figure.peak_extra_bytes),
            "" if way == "ours" else _number(row.time_ratio(way), ".3f"),
            "" if way == "ours" else _number(row.memory_ratio(way), ".3f"),
            _number(figure.launches, "d"),
        )


def _launch_lines(results: Results) -> Iterator[str]:
    if not results.counted:
        return
    yield ""
    yield (
        "kernels of ours on a GPU, counted in Triton's interpreter at a tiny shape, beside the "
        "official code's, counted at ViT-L, batch 48"
    )
    header = ("op", "Triton", "PyTorch", "official")
    table = [
        (op, str(counts["triton"]), str(counts["torch"]), OFFICIAL_LAUNCHES.get(op, ""))
        for op, counts in results.counted.items()
    ]
    yield from aligned([header, *table])


def comparison(old: Results, new: Results) -> str:
    """How many times faster and smaller each way has become."""
    lines = []
    if old.device != new.device or old.versions != new.versions:
        lines.append("warning: another device, thread count or version than the older run's")
    header = ("op", "shape", "way", "old/new: time", "memory")
    table = [
        (op, shape, way, f"{time:.3f}", "" if isnan(memory) else f"{memory:.3f}")
        for op, shape, way, time, memory in compared(old, new)
    ]
    return "\n".join([*lines, *aligned([header, *table])])


def _time(figure: Figure) -> str:
    if figure.seconds is None:
        return figure.note
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if figure.seconds * scale >= 1.0:
            return f"{figure.seconds * scale:.3g} {unit}"
    return f"{figure.seconds * 1e6:.3g} us"


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
