"""What a loader gives a training step, and what a loader is; `loader.Loader` is the one by PyAV."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from torch import Tensor

from fastjepa.data.quarantine import BadFile


class Batch(NamedTuple):
    """One step's clips.

    `clip` uint8 [B, 3, T, H, W]; `extras` is what the loader's `extras` hook returned for the step;
    `bad` holds (path, reason) of each file that could not be read and was replaced by another.
    """

    step: int
    clip: Tensor
    extras: object
    bad: list[BadFile]


class BatchSource(Protocol):
    """Batches of the steps start..stop-1, in order, the same whatever was asked for before."""

    def batches(self, start: int, stop: int) -> Iterator[Batch]: ...

    def first_clip(self) -> Batch: ...

    def close(self) -> None: ...
