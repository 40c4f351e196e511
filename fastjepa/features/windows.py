"""Long videos in windows that overlap, and their features blended to one sequence.

Shapes: T frames of a window, T' its feature steps, N frames or steps of the whole video; H and W
pixels, H' and W' grid cells, D channels.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def windows(
    pictures: Iterable[NDArray[np.uint8]], length: int, overlap: int, tubelet: int
) -> Iterator[tuple[int, Tensor, bool]]:
    """Cut pictures uint8 [3, H, W] into clips [3, T, H, W]: (first feature step, clip, last one?).

    Each window begins `length - overlap` frames after the one before; the last is moved back so
    that it is whole, too. What is shorter than a window is one clip. A rest that fills no tubelet
    is filled with the last picture; a single picture is an image. Holds one window of pictures.
    `length` and `overlap` are frames, multiples of `tubelet`, and 0 <= overlap < length, else
    ValueError.
    """
    if length % tubelet or overlap % tubelet or not 0 <= overlap < length:
        raise ValueError(
            f"windows of {length} frames, overlap {overlap}: expected multiples of the tubelet "
            f"{tubelet}, the overlap the smaller"
        )
    held: deque[NDArray[np.uint8]] = deque(maxlen=length)
    count = due = 0
    ready: tuple[int, Tensor] | None = None
    for picture in pictures:
        held.append(picture)
        count += 1
        if count == due + length:
            if ready:
                yield *ready, False
            ready = due // tubelet, _clip(held)
            due += length - overlap
    if count == 0:
        return
    rest = -count % tubelet if count > 1 else 0
    held.extend([held[-1]] * rest)
    count += rest
    whole = ready is not None and count == due + overlap
    if ready:
        yield *ready, whole
    if not whole:
        yield max(0, count - length) // tubelet, _clip(held), True


def _clip(held: Iterable[NDArray[np.uint8]]) -> Tensor:
    return torch.from_numpy(np.stack(tuple(held), axis=1))


class Blend:
    """Features of one video's windows, averaged where they overlap.

    A step counts the more, the nearer it is to its window's middle, where it sees most around it.
    Holds one weighted sum of the whole video a level, which grows with each window.
    """

    def __init__(self) -> None:
        self._sums: dict[int, NDArray[np.float32]] = {}
        self._weights = np.zeros(0, np.float32)
        self._dtype = torch.float32
        self._alone: Mapping[int, Tensor] | None = None
        self._windows: int | None = None
        self._taken = 0

    def expect(self, windows: int) -> None:
        """How many windows there are, once that is known: before the last one is added."""
        self._windows = windows

    def add(self, first: int, features: Mapping[int, Tensor]) -> bool:
        """Take a window's features by level [T', H', W', D], from step `first` on; True if that
        completes the video."""
        if self._windows == 1:
            self._alone = features
            return True
        self._taken += 1
        steps = len(next(iter(features.values())))
        here = slice(first, first + steps)
        ramp = np.arange(1.0, steps + 1, dtype=np.float32)
        w_T = np.minimum(ramp, ramp[::-1])
        _grow(self._weights, here.stop)
        self._weights[here] += w_T
        for level, x_THWD in features.items():
            self._dtype = x_THWD.dtype
            empty = np.zeros((0, *x_THWD.shape[1:]), np.float32)
            total = self._sums.setdefault(level, empty)
            _grow(total, here.stop)
            total[here] += x_THWD.float().numpy() * w_T[:, None, None, None]
        return self._taken == self._windows

    def result(self) -> dict[int, Tensor]:
        """The video's features by level [N, H', W', D], in the dtype that came; once."""
        if self._alone is not None:
            return dict(self._alone)
        found = {}
        for level in list(self._sums):
            total = self._sums.pop(level)
            total /= self._weights[:, None, None, None]
            found[level] = torch.from_numpy(total).to(self._dtype)
        return found


def _grow(array: NDArray[np.float32], length: int) -> None:
    """Lengthen an array by zeros, where it lies: large ones are moved by the system, not copied."""
    if length > len(array):
        array.resize((length, *array.shape[1:]), refcheck=False)
