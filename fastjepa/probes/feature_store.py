"""Frozen features of a list of files, taken once and kept on disk.

Shards of a few files each are written whole or not at all, so that a probe that was killed goes on
behind the last one. A store's folder is named by all that the features depend on: other weights,
sizes or files go elsewhere.

Shapes: T' steps, H' and W' grid, D channels.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastjepa.checkpoint.tensor_file import read_tensors, write_tensors
from fastjepa.data.augment import normalise
from fastjepa.data.decoder import DecodeError
from fastjepa.data.files import kind_of
from fastjepa.data.media import load_for_features
from fastjepa.durable import whole_file
from fastjepa.features.extract import extract
from fastjepa.model import Encoder

SHARD = 32


@dataclass(frozen=True)
class View:
    """How a file is seen: short side `size` pixels; of a video `segments` clips of `frames` frames
    at `fps`, evenly placed. `square` cuts the middle out; `pool` keeps the mean over all tokens.
    """

    level: int
    size: int
    frames: int = 16
    fps: float = 4.0
    segments: int = 1
    square: bool = False
    pool: bool = False

    def check(self, encoder: Encoder) -> None:
        """Raise ValueError naming the field that the encoder cannot do."""
        if self.level not in encoder.levels:
            raise ValueError(f"level: expected one of {list(encoder.levels)}, got {self.level}")
        if self.size < 1 or self.size % encoder.patch:
            raise ValueError(f"size: {self.size} is no multiple of the patch {encoder.patch}")
        if self.frames < 1 or self.frames % encoder.tubelet:
            raise ValueError(
                f"frames: {self.frames} is no multiple of the tubelet {encoder.tubelet}"
            )
        if not 0.0 < self.fps < math.inf:
            raise ValueError(f"fps: {self.fps:g}, expected a number above 0")
        if self.segments < 1:
            raise ValueError(f"segments: expected at least 1, got {self.segments}")


class FeatureStore:
    """Features by the files' numbers: `store[3]` is float `[T', H', W', D]`, segments one after the
    other in time; with `pool` `[1, 1, 1, D]`. `bad` says why a file has none; `good` numbers the
    others.
    """

    def __init__(self, folder: Path, paths: Sequence[str], view: View, weights: str) -> None:
        self.paths, self._view = list(paths), view
        self.name = named_by(weights, asdict(view), [file_state(path) for path in paths])
        self._folder = folder / self.name
        self._shards: dict[int, dict[str, Tensor]] = {}
        self.bad: dict[int, str] = {}

    @property
    def good(self) -> list[int]:
        """Numbers of the files that have features."""
        return [number for number in range(len(self.paths)) if number not in self.bad]

    def __getitem__(self, number: int) -> Tensor:
        return self._shards[number // SHARD][str(number)]

    def fill(
        self,
        encoder: Encoder,
        *,
        batch: int = 8,
        device: torch.device | str = "cpu",
        advance: Callable[[int], None] = lambda files: None,
    ) -> None:
        """Take the features that are not there yet; `advance` is told how many files are done."""
        self._view.check(encoder)
        self._folder.mkdir(parents=True, exist_ok=True)
        for shard, start in enumerate(range(0, len(self.paths), SHARD)):
            numbers = range(start, min(start + SHARD, len(self.paths)))
            file = self._folder / f"{shard:06d}.safetensors"
            if not file.exists():
                self._write(file, encoder, numbers, batch, device)
            self._shards[shard], about = read_tensors(file)
            self.bad |= {int(number): why for number, why in json.loads(about["bad"]).items()}
            advance(len(numbers))

    def _write(
        self,
        file: Path,
        encoder: Encoder,
        numbers: range,
        batch: int,
        device: torch.device | str,
    ) -> None:
        bad: dict[str, str] = {}
        level = self._view.level

        def clips() -> Iterator[tuple[tuple[int, int], Tensor]]:
            for number in numbers:
                try:
                    loaded = self._clips(self.paths[number], encoder.patch)
                except DecodeError as error:
                    bad[str(number)] = str(error)
                    continue
                for segment, clip in enumerate(loaded):
                    yield (number, segment), normalise(clip)

        parts: dict[tuple[int, int], Tensor] = {}
        for name, features in extract(
            encoder.features, clips(), [level], batch=batch, device=device
        ):
            x_THWD = features[level]
            parts[name] = x_THWD.mean((0, 1, 2), keepdim=True) if self._view.pool else x_THWD
        tensors = {}
        for number in sorted({number for number, _ in parts}):
            own = [parts[name] for name in sorted(parts) if name[0] == number]
            joined = torch.cat(own)
            tensors[str(number)] = joined.mean(0, keepdim=True) if self._view.pool else joined
        about = {"bad": json.dumps(bad)}
        with whole_file(file) as temporary:
            write_tensors(temporary, tensors, about)

    def _clips(self, path: str, patch: int) -> list[Tensor]:
        view = self._view
        count = view.segments if kind_of(path) == "video" else 1
        clips = [
            load_for_features(
                path, view.size, view.frames, view.fps, patch=patch,
                start_fraction=(segment + 0.5) / count,
            )
            for segment in range(count)
        ]  # fmt: skip
        return [_middle(clip, view.size) for clip in clips] if view.square else clips


def weights_digest(encoder: Encoder) -> str:
    """SHA-256 of the encoder's tensors, names and all."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _middle(clip_3THW: Tensor, size: int) -> Tensor:
    top, left = ((side - size) // 2 for side in clip_3THW.shape[2:])
    return clip_3THW[:, :, top : top + size, left : left + size]


def named_by(*facts: object) -> str:
    """A name for a file that depends on all of `facts` (as JSON has them)."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def file_state(path: str) -> tuple[str, int, int]:
    """A file's name, size and time: what was made of it is made anew when it has changed."""
    try:
        about = os.stat(path)
    except OSError:
        return os.path.abspath(path), -1, -1
    return os.path.abspath(path), about.st_size, about.st_mtime_ns
