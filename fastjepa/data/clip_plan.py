"""Which clip a sample is: pure in (seed, stream, sample index, attempt), whoever asks and whenever.

The sample index counts all ranks' samples: `(step * ranks + rank) * batch + slot`. Its random
numbers are the Philox block at (sample index, attempt) under the key (seed, stream), so neither the
number of workers nor a restart can change them. A file that cannot be read is replaced by the
sample's next attempt.
"""

import math
from typing import NamedTuple

import numpy as np

from fastjepa.data.uniforms import uniforms

_CROP_TRIES = 10
# dataset, file, start, flip, then scale, aspect, top and left of each crop that may be tried
_WORDS = 4 + 4 * _CROP_TRIES


class Box(NamedTuple):
    """A crop in whole pixels."""

    top: int
    left: int
    height: int
    width: int


class ClipPlan(NamedTuple):
    """One sample's choices, as uniform numbers in [0, 1) until a file's length and size are known.

    `dataset` and `file` pick the file, `start` the clip's place among all places it fits, `flip`
    says whether to mirror. `crops` float64 [tries, 4] holds (share of the area, width over height,
    place from the top, from the left).
    """

    dataset: float
    file: float
    start: float
    flip: bool
    crops: np.ndarray
    aspect: tuple[float, float]

    def box(self, height: int, width: int) -> Box:
        """Fit the random-resized crop into a picture of `height` x `width` pixels.

        The first crop that fits is taken; if none does, the largest centred one of an allowed
        aspect (as the reference does, `random_resized_crop`).
        """
        for area, aspect, top, left in self.crops:
            w = round(math.sqrt(height * width * area * aspect))
            h = round(math.sqrt(height * width * area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return Box(int(top * (height - h + 1)), int(left * (width - w + 1)), h, w)
        low, high = self.aspect
        w = min(width, max(1, round(height * high)))
        h = min(height, max(1, round(width / low)))
        return Box((height - h) // 2, (width - w) // 2, h, w)


def sample_index(step: int, *, rank: int, ranks: int, batch: int, slot: int) -> int:
    """Number a sample over all steps, ranks and places in the batch."""
    return (step * ranks + rank) * batch + slot


def plan_clip(
    seed: int,
    index: int,
    attempt: int,
    *,
    scale: tuple[float, float],
    aspect: tuple[float, float],
    flip: float,
    stream: int = 0,
) -> ClipPlan:
    """Draw sample `index`'s plan.

    The crop's area is uniform in `scale`, its aspect log-uniform in `aspect`, and it is mirrored
    with probability `flip`. `stream` tells apart loaders that share a seed (videos and images of
    one run).
    """
    u = uniforms(_WORDS, seed, stream, index, attempt)
    crops = u[4:].reshape(_CROP_TRIES, 4).copy()
    crops[:, 0] = scale[0] + crops[:, 0] * (scale[1] - scale[0])
    low, high = math.log(aspect[0]), math.log(aspect[1])
    crops[:, 1] = np.exp(low + crops[:, 1] * (high - low))
    return ClipPlan(float(u[0]), float(u[1]), float(u[2]), bool(u[3] < flip), crops, aspect)
