"""Handwritten digits that move over textured backgrounds: clips whose every pixel has a label.

    clip = MovingDigits(height=128, width=128, frames=16, fps=8.0)[41]
    clip.frames, clip.mask, clip.digits, clip.positions, clip.velocities

The digits are scikit-learn's 1797 real ones. A clip depends on the fields and its index alone, to
the bit: it is made by sums and products only, which are the same on every machine.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fastjepa.data.decoder import Frame
from fastjepa.data.uniforms import uniforms

Split = Literal["train", "test"]
Floats = NDArray[np.float64]

# A cut, not a draw: neighbours among the images may be of one hand.
_NUM_TRAIN = 1437
_STREAM = int.from_bytes(b"digits", "big")
_BACKGROUND, _DIGITS = 0, 1
# The background stays below 160, digits lie above 190; half of the clips are shown as negatives.
_GROUND, _INK = (0.0, 160.0), (190.0, 255.0)
_OCTAVES = (2, 4, 8, 16, 32)


@dataclass(frozen=True)
class DigitsClip:
    """A clip and its labels. Pairs are (down, right); a digit's number is its place in `digits`.

    `frames` uint8 [T, H, W, 3], as decoders give them. `mask` uint8 [T, H, W] is 0 on the
    background and 1 + the class of the digit on top elsewhere, `instance` 1 + its number. `digits`
    int64 [N] are the classes, `images` int64 [N] the rows of scikit-learn's images, `positions`
    float64 [T, N, 2] the centres in pixels, `velocities` float64 [T, N, 2] pixels per second.
    """

    frames: Frame
    mask: NDArray[np.uint8]
    instance: NDArray[np.uint8]
    digits: NDArray[np.int64]
    images: NDArray[np.int64]
    positions: Floats
    velocities: Floats


@dataclass(frozen=True)
class MovingDigits:
    """An endless collection of clips: `digits[index]`.

    `num_digits` digits, each `digit_size` pixels high and wide (3/8 of the short side if None),
    move straight and bounce off the borders; along each axis they go `speed` pixels per second, a
    uniform draw from the given range (a tenth to a half of the short side if None). `split` says
    which images are used: no image is in both. Raises ValueError for what cannot be.
    """

    frames: int = 16
    height: int = 128
    width: int = 128
    fps: float = 8.0
    num_digits: int = 2
    digit_size: int | None = None
    speed: tuple[float, float] | None = None
    split: Split = "train"
    seed: int = 0

    def __post_init__(self) -> None:
        short = min(self.height, self.width)
        if self.frames < 1 or short < 16:
            raise ValueError(
                f"frames is {self.frames}, height {self.height} and width {self.width}, "
                "expected at least 1 frame of 16 x 16 pixels"
            )
        if not self.fps > 0.0:
            raise ValueError(f"fps is {self.fps}, expected more than 0")
        if not 0 <= self.num_digits <= 255:
            raise ValueError(f"num_digits is {self.num_digits}, expected 0 to 255")
        if not 8 <= self._size <= short:
            raise ValueError(f"digit_size is {self._size}, expected 8 to the short side, {short}")
        if not 0.0 <= self._speed[0] <= self._speed[1]:
            raise ValueError(f"speed is {self._speed}, expected 0 <= low <= high")
        if self.split not in ("train", "test"):
            raise ValueError(f"split is {self.split!r}, expected train or test")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}, expected 0 to 2**64 - 1")

    def __getitem__(self, index: int) -> DigitsClip:
        """Make clip `index`, 0 or more."""
        drawn = self._draw(index, _DIGITS, self.num_digits * 8).reshape(self.num_digits, 8)
        images, classes = _images()
        first, end = (0, _NUM_TRAIN) if self.split == "train" else (_NUM_TRAIN, len(images))
        chosen = first + (drawn[:, 0] * (end - first)).astype(np.int64)
        corners, velocities = self._move(drawn[:, 1:3], drawn[:, 3:5])
        ground, negative = self._ground(index)

        pixels = np.repeat(ground[None], self.frames, axis=0)
        mask = np.zeros((self.frames, self.height, self.width), np.uint8)
        instance = mask.copy()
        for number, image in enumerate(chosen):
            shape = _enlarge(images[image], self._size, self._size)
            ink = _between(_INK, drawn[number, 5:8])
            for time in range(self.frames):
                top, left = corners[time, number]
                place, cover = _placed(shape, float(top), float(left))
                below = pixels[time][place]
                cover = cover[: below.shape[0], : below.shape[1]]
                pixels[time][place] = below + cover[..., None] * (ink - below)
                mask[time][place][cover >= 0.5] = 1 + classes[image]
                instance[time][place][cover >= 0.5] = 1 + number
        return DigitsClip(
            frames=(255.0 - pixels if negative else pixels).astype(np.uint8),
            mask=mask,
            instance=instance,
            digits=classes[chosen],
            images=chosen,
            positions=corners + (self._size - 1) / 2,
            velocities=velocities,
        )

    @property
    def _size(self) -> int:
        default = min(self.height, self.width) * 3 // 8
        return max(8, default) if self.digit_size is None else self.digit_size

    @property
    def _speed(self) -> tuple[float, float]:
        short = min(self.height, self.width)
        return (0.1 * short, 0.5 * short) if self.speed is None else self.speed

    def _draw(self, index: int, part: int, count: int) -> Floats:
        return uniforms(count, self.seed, _STREAM, index, part)

    def _move(self, u_place: Floats, u_speed: Floats) -> tuple[Floats, Floats]:
        """Upper left corners and velocities [T, N, 2]: straight on, and back from the borders."""
        room = np.array([self.height - self._size, self.width - self._size], np.float64)
        # The sign is the draw's first bit, the speed is the rest.
        speed = _between(self._speed, (2.0 * u_speed) % 1.0) * np.where(u_speed < 0.5, -1.0, 1.0)
        times = np.arange(self.frames)[:, None, None] / self.fps
        # On a way twice as long, there and back again, nothing ever turns round.
        way = np.where(room > 0, 2.0 * room, 1.0)
        gone = (u_place * room + speed * times) % way
        back = gone > room
        corners = np.where(room > 0, np.where(back, way - gone, gone), 0.0)
        return corners, np.where(room > 0, np.where(back, -speed, speed), 0.0)

    def _ground(self, index: int) -> tuple[Floats, bool]:
        """A texture float64 [H, W, 3], noise of several sizes; and whether to show a negative."""
        count = 3 * sum(size * size for size in _OCTAVES)
        drawn = self._draw(index, _BACKGROUND, count + 1)
        texture = np.zeros((self.height, self.width, 3))
        begin = 0
        for octave, size in enumerate(_OCTAVES):
            grid = drawn[begin : begin + 3 * size * size].reshape(size, size, 3)
            texture += _enlarge(grid - 0.5, self.height, self.width) * 0.75**octave
            begin += 3 * size * size
        return _between(_GROUND, np.clip(texture + 0.5, 0.0, 1.0)), bool(drawn[-1] < 0.5)


def _between(limits: tuple[float, float], share: Floats) -> Floats:
    low, high = limits
    return low + share * (high - low)


def _enlarge(grid: Floats, height: int, width: int) -> Floats:
    """Stretch [h, w, ...] to [height, width, ...], corner to corner, linear between."""
    for axis, length in ((0, height), (1, width)):
        grid = np.moveaxis(grid, axis, 0)
        place = np.arange(length) * ((len(grid) - 1) / max(1, length - 1))
        lower = np.minimum(place.astype(np.intp), len(grid) - 2)
        share = (place - lower).reshape(-1, *[1] * (grid.ndim - 1))
        grid = np.moveaxis(grid[lower] + share * (grid[lower + 1] - grid[lower]), 0, axis)
    return grid


def _placed(shape: Floats, top: float, left: float) -> tuple[tuple[slice, slice], Floats]:
    """The pixels that a shape touches from (top, left) on, and how much it covers of each."""
    row, column = int(top), int(left)
    down, right = top - row, left - column
    cover = np.pad(shape, ((0, 1), (0, 1)))
    cover = cover + down * (np.pad(shape, ((1, 0), (0, 1))) - cover)
    shifted = np.pad(cover, ((0, 0), (1, 0)))[:, :-1]
    cover = cover + right * (shifted - cover)
    size = len(cover)
    return (slice(row, row + size), slice(column, column + size)), cover


@cache
def _images() -> tuple[Floats, NDArray[np.int64]]:
    """All images [1797, 10, 10], 0 to 1 with an empty border, and their classes [1797]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError(
            "the moving digits need scikit-learn: pip install 'fastjepa[demo]'"
        ) from None
    found = load_digits()
    images = np.pad(found.images / 16.0, ((0, 0), (1, 1), (1, 1)))
    return images, found.target.astype(np.int64)
