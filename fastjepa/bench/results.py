"""The figures of one run, their file, and the comparison of two.

Times are in seconds, sizes in bytes. A figure that is None was not measured, and `note` says why.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastjepa.durable import atomic_file

FORMAT = "fastjepa bench kernels 1"


@dataclass(frozen=True)
class Figure:
    """One way of one case: the median of `rounds`, the peak of memory beyond the inputs, kernels
    launched."""

    seconds: float | None
    rounds: list[float]
    peak_extra_bytes: int | None
    launches: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One op at one shape. `bytes` and `flops` are the least work (case.py)."""

    op: str
    measures: str
    shape: str
    dtype: str
    bytes: int
    flops: int
    ways: dict[str, Figure] = field(default_factory=dict)

    def time_ratio(self, way: str) -> float | None:
        """Ours over another way: the median over rounds, in which both took their turn."""
        ours, other = self.ways.get("ours"), self.ways.get(way)
        if ours is None or other is None or not (ours.rounds and other.rounds):
            return None
        pairs = zip(ours.rounds, other.rounds, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    def memory_ratio(self, way: str) -> float | None:
        ours, other = self.ways.get("ours"), self.ways.get(way)
        if ours is None or other is None:
            return None
        if ours.peak_extra_bytes is None or not other.peak_extra_bytes:
            return None
        return ours.peak_extra_bytes / other.peak_extra_bytes

    def bandwidth(self, way: str) -> float | None:
        """Bytes a second: the least bytes over the time."""
        figure = self.ways.get(way)
        return None if figure is None or figure.seconds is None else self.bytes / figure.seconds


@dataclass(frozen=True)
class Results:
    """All that a run found, and where. `counted`: kernels of our ops by case, `triton` and
    `torch`, where no GPU could count them."""

    command: str
    commit: str
    device: dict[str, Any]
    versions: dict[str, str]
    official: str
    copy_bytes_per_second: float
    rows: list[Row]
    counted: dict[str, dict[str, int]]

    def save(self, path: Path) -> None:
        """As JSON, with the ratios worked out beside the figures."""
        rows = []
        for row in self.rows:
            entry = asdict(row)
            for way, figure in entry["ways"].items():
                bandwidth = row.bandwidth(way)
                share = bandwidth and bandwidth / self.copy_bytes_per_second
                figure |= {"bytes_per_second": bandwidth, "share_of_copy": share}
                if way != "ours":
                    figure["ours_over_this_time"] = row.time_ratio(way)
                    figure["ours_over_this_memory"] = row.memory_ratio(way)
            rows.append(entry)
        text = json.dumps({"format": FORMAT, **asdict(self), "rows": rows}, indent=1)
        with atomic_file(path) as file:
            file.write(f"{text}\n".encode())


def load_results(path: Path) -> Results:
    """Read a file that `save` wrote. Raises ValueError naming the file if it is another."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("format") != FORMAT:
            raise ValueError("format")
        found["rows"] = [_row(row) for row in found["rows"]]
        return Results(**found)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a file that `{FORMAT[:-2]} --json` wrote") from error


def _row(entry: Mapping[str, Any]) -> Row:
    names = Figure.__dataclass_fields__
    ways = {
        way: Figure(**{name: figure[name] for name in names})
        for way, figure in entry["ways"].items()
    }
    return Row(**{**entry, "ways": ways})


def compared(old: Results, new: Results) -> Sequence[tuple[str, str, str, float, float]]:
    """(op, shape, way, old time / new time, old memory / new memory) of what both measured; nan
    where one has no memory."""
    before = {(row.op, row.shape): row for row in old.rows}
    found = []
    for row in new.rows:
        earlier = before.get((row.op, row.shape))
        for way, figure in row.ways.items():
            was = earlier.ways.get(way) if earlier else None
            if was is None or not was.seconds or not figure.seconds:
                continue
            memory = float("nan")
            if was.peak_extra_bytes and figure.peak_extra_bytes:
                memory = was.peak_extra_bytes / figure.peak_extra_bytes
            found.append((row.op, row.shape, way, was.seconds / figure.seconds, memory))
    return found
