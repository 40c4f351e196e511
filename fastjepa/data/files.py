"""Files in columns: a million of them cost about the length of their names, and travel as a few
buffers.

    files = Files.of([Entry("/a.mp4", "video"), Entry("/b.png", "image", 3.0)])
    files[1].path, len(files)
"""

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, get_args, overload

import numpy as np
from numpy.typing import NDArray

from fastjepa.data.quarantine import BadFile

Kind = Literal["video", "image"]


KINDS: tuple[Kind, ...] = get_args(Kind)
VIDEO_EXTENSIONS = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts"}
    | {".wmv", ".flv", ".3gp", ".ogv", ".gif", ".y4m"}
)
IMAGE_EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
)


class ManifestError(ValueError):
    """The manifest cannot be used; the message names the file, the place and what fits."""


class Entry(NamedTuple):
    """One media file: where it is, what it is, and its weight within its data set."""

    path: str
    kind: Kind
    weight: float = 1.0


def kind_of(path: str | os.PathLike[str]) -> Kind | None:
    """Tell a video from an image by the file's extension; None for anything else."""
    extension = os.path.splitext(path)[1].lower()
    if extension in VIDEO_EXTENSIONS:
        return "video"
    return "image" if extension in IMAGE_EXTENSIONS else None


def local_path(path: str) -> Path:
    """`path` with a home folder for its `~`. Raises ManifestError where that is not known."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ManifestError(f"{path}: {error}") from None


@dataclass(frozen=True, eq=False)
class Files(Sequence[Entry]):
    """A list of entries, made anew when asked for.

    `text` holds the paths one after the other (UTF-8, as the file system gives them), `ends` int64
    [N] where each one ends, `kinds` uint8 [N] places in KINDS. `weights` float64 [N] is None where
    all are 1. `bad` are files that an index found unreadable, (path, reason) each: no entries.
    """

    text: bytes
    ends: NDArray[np.int64]
    kinds: NDArray[np.uint8]
    weights: NDArray[np.float64] | None = None
    bad: tuple[BadFile, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, entries: Iterable[Entry], bad: Iterable[BadFile] = ()) -> "Files":
        """Put entries into columns, one by one."""
        if isinstance(entries, cls):
            return entries
        text, ends, kinds, weights = bytearray(), array("q"), bytearray(), array("d")
        for path, kind, weight in entries:
            text += path.encode("utf-8", "surrogateescape")
            ends.append(len(text))
            kinds.append(KINDS.index(kind))
            weights.append(weight)
        return cls(
            bytes(text),
            np.array(ends, np.int64),
            np.frombuffer(bytes(kinds), np.uint8),
            _unless_all_one(np.array(weights, np.float64)),
            tuple(bad),
        )

    @classmethod
    def joined(cls, parts: Sequence["Files"]) -> "Files":
        """One list after the other."""
        sizes = np.cumsum([0] + [len(part.text) for part in parts])
        weights = [part.weights_or_ones() for part in parts]
        return cls(
            b"".join(part.text for part in parts),
            np.concatenate([part.ends + size for part, size in zip(parts, sizes, strict=False)]),
            np.concatenate([part.kinds for part in parts]),
            _unless_all_one(np.concatenate(weights)),
            tuple(bad for part in parts for bad in part.bad),
        )

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, row: int) -> Entry: ...
    @overload
    def __getitem__(self, row: slice) -> list[Entry]: ...
    def __getitem__(self, row: int | slice) -> Entry | list[Entry]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} files")
        row %= len(self)
        weight = 1.0 if self.weights is None else float(self.weights[row])
        return Entry(
            self._name(row).decode("utf-8", "surrogateescape"), KINDS[self.kinds[row]], weight
        )

    def __eq__(self, other: object) -> bool:
        """Equal to any sequence of the same entries."""
        return isinstance(other, Sequence) and list(self) == list(other)

    def weights_or_ones(self) -> NDArray[np.float64]:
        """The weights as float64 [N]."""
        return np.ones(len(self)) if self.weights is None else self.weights

    def hashes(self) -> NDArray[np.int64]:
        """A number for each path, equal where paths are (of this process alone): int64 [N]."""
        return np.fromiter(map(hash, self._names()), np.int64, len(self))

    def _names(self) -> Iterator[bytes]:
        start = 0
        for rows in range(0, len(self), 2**16):
            for end in self.ends[rows : rows + 2**16].tolist():
                yield self.text[start:end]
                start = end

    def _name(self, row: int) -> bytes:
        return self.text[int(self.ends[row - 1]) if row else 0 : int(self.ends[row])]


def _unless_all_one(weights: NDArray[np.float64]) -> NDArray[np.float64] | None:
    return None if (weights == 1.0).all() else weights
