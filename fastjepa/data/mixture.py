"""Data sets mixed by weight: two uniform numbers in, one file out, with replacement.

A file's probability is its data set's weight times the file's share of that data set.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fastjepa.data.files import Entry, Files, Kind


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
        tables = [Files.of(entries) for entries, _ in datasets]
        self._file_ends = [_file_ends(files, number) for number, files in enumerate(tables)]
        # Weights and bad files are not drawn from: no worker needs them.
        self._files = [replace(files, weights=None, bad=()) for files in tables]
        self.num_files = len(np.unique(np.concatenate([files.hashes() for files in tables])))

    def pick(self, u_dataset: float, u_file: float) -> tuple[str, Kind]:
        """Return path and kind of the file that two uniform numbers in [0, 1) stand for."""
        dataset = _index_at(self._dataset_ends, u_dataset)
        files, ends = self._files[dataset], self._file_ends[dataset]
        row = int(u_file * len(files)) if ends is None else _index_at(ends, u_file)
        path, kind, _ = files[row]
        return path, kind


def _file_ends(files: Files, number: int) -> NDArray[np.float64] | None:
    """Cumulative weights of a data set's files, or None when all are alike."""
    weights = files.weights
    if weights is None:
        return None
    if not (np.isfinite(weights).all() and (weights >= 0.0).all() and weights.any()):
        raise ValueError(f"datasets[{number}]: file weights must be finite, 0 or more, not all 0")
    return None if (weights == weights[0]).all() else np.cumsum(weights)


def _index_at(ends: NDArray[np.float64], u: float) -> int:
    """Index of the interval that holds `u` of the total; an interval of width 0 is never hit."""
    return int(np.searchsorted(ends, min(u * ends[-1], np.nextafter(ends[-1], 0.0)), side="right"))
