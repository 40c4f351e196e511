"""The figures of `fastjepa bench step`, and their file.

Times are in seconds, sizes in bytes, operations are floating-point ones. `None` was not measured.
"""

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastjepa.durable import atomic_file

FORMAT = "fastjepa bench step 1"
OURS, OFFICIAL = "ours", "official"


@dataclass(frozen=True)
class Memory:
    """Live tensors of one side alone: at the height of a step, and between two steps."""

    peak: int
    kept: int


@dataclass(frozen=True)
class Counted:
    """One step's device operations and the bytes they read and write, at the step's own shape;
    kernels launched, where a GPU counted them or, without one, on a tiny grid of the same depth."""

    operations: int
    bytes: int
    kernels: int | None = None


@dataclass(frozen=True)
class Side:
    """One way to make the step. `rounds` are seconds of steps that took turns with the other
    sides', `processor` the seconds in which a processor was at work for them, `stages` those of one
    step stage by stage, timed apart and later."""

    dtype: str
    rounds: list[float]
    processor: list[float]
    losses: list[float]
    stages: dict[str, float] = field(default_factory=dict)
    memory: Memory | None = None
    counted: Counted | None = None
    traced: list[tuple[str, int, float]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return statistics.median(self.rounds)


@dataclass(frozen=True)
class Point:
    """One setting: `changes` are the swept keys; `flops` the model's operations of a mean step,
    part by part (no recompute); `data` the seconds in which the recipe's workers load a batch.
    Operations a second of a large matrix product, by dtype: `matrix_rates` at its best, in a short
    round, `held_rates` for seconds on end."""

    changes: dict[str, str]
    model: str
    frames: int
    crop: int
    batch: int
    tokens: int
    context: tuple[float, ...]
    predicted: tuple[float, ...]
    flops: dict[str, int]
    data: float
    sides: dict[str, Side]
    matrix_rates: dict[str, float]
    held_rates: dict[str, float]

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())

    def clips_per_second(self, side: str) -> float:
        return self.batch / self.sides[side].seconds

    def utilisation(self, side: str, *, held: bool = False) -> float:
        """Model operations a second over the rate of a large matrix product in the side's dtype, at
        its best or held."""
        own, rates = self.sides[side], self.held_rates if held else self.matrix_rates
        return self.total_flops / own.seconds / rates[own.dtype]

    def memory_per_clip(self, side: str) -> float | None:
        """What a clip adds to what stays between the steps."""
        memory = self.sides[side].memory
        return None if memory is None else (memory.peak - memory.kept) / self.batch

    def time_ratio(self, side: str, other: str) -> float:
        """The median over rounds, in which both took their turn."""
        return _ratio(self.sides[side].rounds, self.sides[other].rounds)

    def processor_ratio(self, side: str, other: str) -> float:
        """That of the processors' time, which other work on the machine hardly changes."""
        return _ratio(self.sides[side].processor, self.sides[other].processor)

    def memory_ratio(self, side: str, other: str) -> float | None:
        ours, theirs = self.sides[side].memory, self.sides[other].memory
        return None if ours is None or theirs is None else ours.peak / theirs.peak

    def loss_difference(self, side: str, other: str) -> float:
        """The largest relative difference of a step's loss; NaN if one is."""
        pairs = zip(self.sides[side].losses, self.sides[other].losses, strict=True)
        return float(np.max([abs(a - b) / abs(b) for a, b in pairs]))


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


@dataclass(frozen=True)
class StepResults:
    """All that a run found, and where."""

    command: str
    commit: str
    reference: str
    device: dict[str, Any]
    versions: dict[str, str]
    points: list[Point]

    def save(self, path: Path) -> None:
        """As JSON, with what follows from the figures beside them."""
        entries = []
        for point in self.points:
            entry = asdict(point)
            entry["total_flops"] = point.total_flops
            for name, side in entry["sides"].items():
                side |= {
                    "seconds": point.sides[name].seconds,
                    "clips_per_second": point.clips_per_second(name),
                    "model_flops_utilisation": point.utilisation(name),
                    "model_flops_utilisation_held": point.utilisation(name, held=True),
                    "bytes_per_clip": point.memory_per_clip(name),
                }
                if OFFICIAL in point.sides and name != OFFICIAL:
                    side |= {
                        "time_ratio": point.time_ratio(name, OFFICIAL),
                        "processor_ratio": point.processor_ratio(name, OFFICIAL),
                        "memory_ratio": point.memory_ratio(name, OFFICIAL),
                        "loss_relative_difference": point.loss_difference(name, OFFICIAL),
                    }
            entries.append(entry)
        text = json.dumps({"format": FORMAT, **asdict(self), "points": entries}, indent=1)
        with atomic_file(path) as file:
            file.write(f"{text}\n".encode())
