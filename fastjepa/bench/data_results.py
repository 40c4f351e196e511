"""The figures of one `fastjepa bench data`, and their file. None is a figure not measured."""

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastjepa.durable import atomic_file

FORMAT = "fastjepa bench data 1"


@dataclass(frozen=True)
class Setting:
    """What a clip is, and how many processes make it."""

    files: int
    frames: int
    fps: float
    crop: int
    batch: int
    workers: int
    seconds: float


@dataclass(frozen=True)
class Turn:
    """One turn of one way: clips a second, CPU seconds of all processes a clip."""

    clips_per_second: float
    cpu_seconds_per_clip: float


@dataclass(frozen=True)
class Way:
    """One way to the clips: its turns, memory of its processes, frames that were not the ones asked
    for."""

    turns: list[Turn]
    worker_bytes: int | None = None
    frames_looked_at: int = 0
    wrong_frames: list[str] = field(default_factory=list)

    @property
    def clips_per_second(self) -> float | None:
        """The median over turns."""
        return statistics.median(t.clips_per_second for t in self.turns) if self.turns else None

    @property
    def cores_per_clip(self) -> float | None:
        """CPU seconds a clip: the cores that one clip a second keeps busy."""
        return statistics.median(t.cpu_seconds_per_clip for t in self.turns) if self.turns else None


@dataclass(frozen=True)
class Results:
    """All that a run found, and where. `stages`: CPU seconds a clip in one process, by stage, of
    the PyAV decoder. `target`: clips a second that training takes, if it was asked about."""

    command: str
    commit: str
    device: dict[str, Any]
    versions: dict[str, str]
    reference: str
    setting: Setting
    ways: dict[str, Way]
    stages: dict[str, float]
    target: float | None = None

    def over_official(self, name: str) -> float | None:
        """Clips a second over the official loader's: the median over turns taken next to each
        other."""
        official = self.ways.get("official")
        if (
            official is None
            or not official.turns
            or name == "official"
            or not self.ways[name].turns
        ):
            return None
        pairs = zip(self.ways[name].turns, official.turns, strict=True)
        return statistics.median(a.clips_per_second / b.clips_per_second for a, b in pairs)

    def cores_needed(self, name: str) -> float | None:
        """CPU cores that `target` clips a second keep busy."""
        share = self.ways[name].cores_per_clip
        return None if self.target is None or share is None else self.target * share

    def devices_needed(self, name: str) -> float | None:
        """GPUs whose decoders give `target` clips a second, for a way that decodes there."""
        speed = self.ways[name].clips_per_second
        if self.target is None or speed is None or name != "dali":
            return None
        return self.target / speed

    def save(self, path: Path) -> None:
        """As JSON, with what follows from the figures worked out beside them."""
        found = asdict(self)
        for name, way in self.ways.items():
            found["ways"][name] |= {
                "clips_per_second": way.clips_per_second,
                "cores_per_clip": way.cores_per_clip,
                "over_official": self.over_official(name),
                "cores_needed": self.cores_needed(name),
                "devices_needed": self.devices_needed(name),
            }
        with atomic_file(path) as file:
            file.write(f"{json.dumps({'format': FORMAT, **found}, indent=1)}\n".encode())
