"""What a loader gives a training step, and what a loader is; `loader.Loader` is the one there is.

Where a device decodes (decode_dali), workers send samples that are not yet pixels: `pack` lays
their bytes into one tensor, which travels as a clip does, and `unpack` takes them out again.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastjepa.data.clip_plan import Box
from fastjepa.data.cut import Cut
from fastjepa.data.quarantine import BadFile


class Sample(NamedTuple):
    """One clip: that of `path`, drawn at the sample's `attempt`.

    `data` is its pixels, uint8 [3, T, H, W], or where there is a `cut` that cut's file, uint8 [N].
    """

    path: str
    attempt: int
    data: Tensor
    cut: Cut | None = None


class Part(NamedTuple):
    """A sample whose data lies in its batch's `clip`, after that of the parts before it."""

    path: str
    attempt: int
    shape: tuple[int, ...]
    cut: Cut | None


class Batch(NamedTuple):
    """One step's clips.

    `clip` uint8 [B, 3, T, H, W], or float32 where the decoder has normalised it already; `extras`
    is what the loader's `extras` hook returned for the step; `bad` holds (path, reason) of each
    file that could not be read and was replaced by another. `parts` is empty, except on the way
    to a device that decodes.
    """

    step: int
    clip: Tensor
    extras: object
    bad: list[BadFile]
    parts: tuple[Part, ...] = ()


class BatchSource(Protocol):
    """Batches of the steps start..stop-1, in order, the same whatever was asked for before."""

    def batches(self, start: int, stop: int) -> Iterator[Batch]: ...

    def first_clip(self) -> Batch: ...

    def close(self) -> None: ...


# (step, slot, first attempt, bad files met) to the next sample that can be read, as pixels.
Redraw = Callable[[int, int, int, dict[str, str]], Sample]


class ClipCutter(Protocol):
    """Takes a clip's compressed pictures out of a file, or returns None: see `cut_clip`."""

    def __call__(
        self,
        path: str,
        *,
        start_fraction: float,
        frames: int,
        fps: float,
        box: Callable[[int, int], Box],
        flip: bool,
    ) -> tuple[bytearray, Cut] | None: ...


class DeviceDecoder(Protocol):
    """Decodes in the training process what the workers have taken out with its `cutter`.

    `finish` turns packed batches of up to `batch` clips into whole ones of `crop` pixels, in order.
    A sample that it cannot decode it takes from `redraw`, and names the file in `Batch.bad`.
    """

    @property
    def cutter(self) -> ClipCutter: ...

    def finish(
        self, batches: Iterator[Batch], redraw: Redraw, *, batch: int, crop: int
    ) -> Generator[Batch, None, None]: ...


def pack(samples: Sequence[Sample]) -> tuple[Tensor, tuple[Part, ...]]:
    """Lay the samples' data one after another, uint8 [N], and say what lies there."""
    parts = tuple(Part(s.path, s.attempt, tuple(s.data.shape), s.cut) for s in samples)
    return torch.cat([sample.data.reshape(-1) for sample in samples]), parts


def unpack(batch: Batch) -> list[Sample]:
    """The samples of a packed batch, as views of its `clip`."""
    sizes = [torch.Size(part.shape).numel() for part in batch.parts]
    return [
        Sample(part.path, part.attempt, data.view(part.shape), part.cut)
        for part, data in zip(batch.parts, batch.clip.split(sizes), strict=True)
    ]
