"""Data sets mixed by weight: two uniform numbers in, one file out, with replacement.

A file's probability is its data set's weight times the file's share of that data set. Paths lie in
one byte array, so that a million entries reach a worker process as a few buffers and cost about
their own length.
"""

import math
from collections.abc import Sequence
from typing import get_args

import numpy as np

from fastjepa.data.manifest import Entry, Kind

_KINDS: tuple[Kind, ...] = get_args(Kind)


class Mixture:
    """Files of all data sets in one table, and how likely each is.

    `datasets` pairs a manifest with its weight. Raises ValueError for no data set, an empty one, or
    a weight that is not a positive number.
    """

    def __init__(self, datasets: Sequence[tuple[Sequence[Entry], float]]) -> None:
        if not datasets:
            raise ValueError("datasets: none given, expected at least one")
        for number, (entries, weight) in enumerate(datasets):
            if not entries:
                raise ValueError(f"datasets[{number}]: no files")
            if not (math.isfinite(weight) and weight > 0.0):
                raise ValueError(f"datasets[{number}]: weight is {weight!r}, expected more than 0")
        self._dataset_ends = np.cumsum([weight for _, weight in datasets], dtype=np.float64)
        self._first_row = np.cumsum([0] + [len(entries) for entries, _ in datasets])
        self._file_ends = [_file_ends(entries, i) for i, (entries, _) in enumerate(datasets)]
        paths = [entry.path.encode("utf-8", "surrogateescape") for e, _ in datasets for entry in e]
        self._ends = np.cumsum([len(path) for path in paths], dtype=np.int64)
        self._text = b"".join(paths)
        kinds = [_KINDS.index(entry.kind) for entries, _ in datasets for entry in entries]
        self._kinds = np.array(kinds, np.uint8)
        self.num_files = len(set(paths))

    def pick(self, u_dataset: float, u_file: float) -> tuple[str, Kind]:
        """Return path and kind of the file that two uniform numbers in [0, 1) stand for."""
        dataset = _index_at(self._dataset_ends, u_dataset)
        first, end = int(self._first_row[dataset]), int(self._first_row[dataset + 1])
        ends = self._file_ends[dataset]
        row = first + (int(u_file * (end - first)) if ends is None else _index_at(ends, u_file))
        start = int(self._ends[row - 1]) if row else 0
        path = self._text[start : int(self._ends[row])].decode("utf-8", "surrogateescape")
        return path, _KINDS[self._kinds[row]]


def _file_ends(entries: Sequence[Entry], number: int) -> np.ndarray | None:
    """Cumulative weights of a data set's files, or None when all are alike."""
    weights = np.array([entry.weight for entry in entries], np.float64)
    if not (np.isfinite(weights).all() and (weights >= 0.0).all() and weights.any()):
        raise ValueError(f"datasets[{number}]: file weights must be finite, 0 or more, not all 0")
    return None if (weights == weights[0]).all() else np.cumsum(weights)


def _index_at(ends: np.ndarray, u: float) -> int:
    """Index of the interval that holds `u` of the total; an interval of width 0 is never hit."""
    return int(np.searchsorted(ends, min(u * ends[-1], np.nextafter(ends[-1], 0.0)), side="right"))
