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
    """Features of one video's windows, in any order of arrival, averaged where they overlap.

    A step counts the more, the nearer it is to its window's middle, where it sees most around it.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[int, Mapping[int, Tensor]]] = []
        self._windows: int | None = None

    def expect(self, windows: int) -> None:
        """How many windows there are, once that is known."""
        self._windows = windows

    def add(self, first: int, features: Mapping[int, Tensor]) -> bool:
        """Take a window's features by level [T', H', W', D], from step `first` on; True if that
        completes the video."""
        self._parts.append((first, features))
        return len(self._parts) == self._windows

    def result(self) -> dict[int, Tensor]:
        """The video's features by level [N, H', W', D], in the dtype that came."""
        self._parts.sort(key=lambda part: part[0])
        if len(self._parts) == 1:
            return dict(self._parts[0][1])
        return {level: self._level(level) for level in self._parts[0][1]}

    def _level(self, level: int) -> Tensor:
        parts = [(first, features[level]) for first, features in self._parts]
        steps = max(first + len(x) for first, x in parts)
        like = parts[0][1]
        total = torch.zeros(steps, *like.shape[1:])
        weight = torch.zeros(steps, 1, 1, 1)
        for first, x_THWD in parts:
            ramp = torch.arange(1.0, len(x_THWD) + 1)
            w_T = torch.minimum(ramp, ramp.flip(0)).view(-1, 1, 1, 1)
            total[first : first + len(x_THWD)] += w_T * x_THWD.float()
            weight[first : first + len(x_THWD)] += w_T
        return (total / weight).to(like.dtype)
