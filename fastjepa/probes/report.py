"""A probe's result: one JSON file, one table."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fastjepa.durable import write_text
from fastjepa.observe.tables import aligned


class Advance(Protocol):
    """Called with how much more is done."""

    def __call__(self, by: int = 1, /) -> None: ...


@dataclass(frozen=True)
class Result:
    """What a probe found. `scores` are of test files with the `chosen` setting, which was found on
    held-out training files; `candidates` has each setting's score there and on the test files.
    `skipped` are files that cannot be read, with the reason.
    """

    probe: str
    weights: str
    setup: Mapping[str, Any]
    scores: Mapping[str, float]
    chosen: Mapping[str, Any] = field(default_factory=dict)
    candidates: list[dict[str, Any]] = field(default_factory=list)
    parts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)

    def save(self, file: Path) -> None:
        """Write the JSON, whole or not at all."""
        write_text(file, json.dumps(vars(self), indent=1) + "\n")

    def lines(self) -> list[str]:
        """The table: scores, what was chosen, each candidate and each part."""
        rows = [(name, f"{value:.4f}") for name, value in self.scores.items()]
        rows += [(f"chosen {name}", str(value)) for name, value in self.chosen.items()]
        text = [f"{self.probe} of {self.weights}", *aligned(rows)]
        tables = [self.candidates]
        tables.append([{"part": name, **scores} for name, scores in self.parts.items()])
        for table in tables:
            if table:
                head = list(table[0])
                cells = [[_cell(row[name]) for name in head] for row in table]
                text += ["", *aligned([head, *cells])]
        text += [f"skipped {path}: {why}" for path, why in self.skipped.items()]
        return text


@contextmanager
def progress(what: str, total: int) -> Iterator[Advance]:
    """A bar on the error stream."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda by=1: bar.advance(task, by)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
