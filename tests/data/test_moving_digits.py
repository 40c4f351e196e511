"""Clips of moving digits are pure in their index, and their labels are those of their pixels."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastjepa.data.moving_digits import DigitsClip, MovingDigits


@st.composite
def sources(draw: st.DrawFn) -> MovingDigits:
    return MovingDigits(
        frames=draw(st.integers(1, 12)),
        height=draw(st.integers(16, 80)),
        width=draw(st.integers(16, 80)),
        fps=draw(st.sampled_from([1.0, 4.0, 23.976, 60.0])),
        num_digits=draw(st.integers(0, 4)),
        digit_size=draw(st.one_of(st.none(), st.integers(8, 16))),
        speed=draw(st.sampled_from([None, (0.0, 0.0), (3.0, 40.0), (500.0, 900.0)])),
        split=draw(st.sampled_from(["train", "test"])),
        seed=draw(st.integers(0, 2**64 - 1)),
    )


def _size(source: MovingDigits) -> int:
    return source.digit_size or max(8, min(source.height, source.width) * 3 // 8)


def _same(one: DigitsClip, other: DigitsClip) -> bool:
    return all(np.array_equal(getattr(one, f), getattr(other, f)) for f in vars(one))


@settings(max_examples=40, deadline=None)
@given(sources(), st.integers(0, 2**32), st.integers(0, 2**32))
def test_a_clip_depends_on_its_index_alone(source: MovingDigits, index: int, other: int) -> None:
    clip = source[index]
    elsewhere = source[other]
    assert _same(source[index], clip)
    assert index == other or not np.array_equal(clip.frames, elsewhere.frames)
    steps, size = (source.frames, source.height, source.width), source.num_digits
    assert clip.frames.shape == (*steps, 3)
    assert clip.mask.shape == clip.instance.shape == steps
    assert clip.frames.dtype == clip.mask.dtype == clip.instance.dtype == np.uint8
    assert clip.digits.shape == clip.images.shape == (size,)
    assert clip.positions.shape == clip.velocities.shape == (source.frames, size, 2)


def test_another_process_makes_the_same_clip() -> None:
    code = (
        "import hashlib; from fastjepa.data.moving_digits import MovingDigits;"
        "print(hashlib.sha256(MovingDigits(seed=3)[7].frames.tobytes()).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # Written down: clips must not change with a library, a machine or a version of this file.
    assert done.stdout.strip() == "6ece2cca745a646aa22d11f1a642493b4f4a19540977337bdf5bbfde600deefb"


@settings(max_examples=40, deadline=None)
@given(sources(), st.integers(0, 1000))
def test_masks_are_where_digits_were_drawn(source: MovingDigits, index: int) -> None:
    clip = source[index]
    settings = {name: getattr(source, name) for name in ("height", "width", "frames", "seed")}
    ground = MovingDigits(**settings, num_digits=0)[index].frames
    change = np.abs(clip.frames.astype(int) - ground).max(3)
    # Half of a digit's ink changes a pixel by at least half of the distance of the two ranges.
    assert (change[clip.mask > 0] >= 14).all()
    classes = np.concatenate([[0], clip.digits + 1])
    assert np.array_equal(clip.mask, classes[clip.instance])
    # A change lies within the square of a digit.
    for time in range(source.frames):
        near = np.zeros_like(change[time], bool)
        for down, right in clip.positions[time] - (_size(source) - 1) / 2:
            rows = slice(int(down), int(down) + _size(source) + 1)
            near[rows, int(right) : int(right) + _size(source) + 1] = True
        assert not change[time][~near].any()
        assert not clip.instance[time][~near].any()


@settings(max_examples=60, deadline=None)
@given(sources(), st.integers(0, 1000))
def test_velocities_are_those_of_the_positions(source: MovingDigits, index: int) -> None:
    clip = source[index]
    half = (_size(source) - 1) / 2
    limit = np.array([source.height, source.width]) - 1 - half
    assert (clip.positions >= half - 1e-9).all()
    assert (clip.positions <= limit + 1e-9).all()
    straight = (clip.velocities[1:] == clip.velocities[:-1]).all(2)
    moved = np.diff(clip.positions, axis=0) * source.fps
    # An even number of turns between two frames leaves the velocity as it was.
    room = np.array([source.height, source.width]) - _size(source)
    once = straight & (np.abs(clip.velocities[1:]) / source.fps < np.maximum(room, 1e-9)).all(2)
    assert np.abs(moved - clip.velocities[1:])[once].max(initial=0.0) < 1e-6 * max(1, source.fps)
    speed = np.abs(clip.velocities)
    assert (speed == speed[:1]).all()
    if source.speed is not None:
        low, high = source.speed
        assert ((speed == 0) | ((speed >= low) & (speed <= high))).all()


def test_a_digit_is_seen_where_its_position_says() -> None:
    """The mask's box is centred on the position, give or take the shape of the digit."""
    source = MovingDigits(num_digits=1, height=96, width=128, frames=24, fps=8.0)
    for index in range(8):
        clip = source[index]
        for time in range(source.frames):
            rows, columns = np.nonzero(clip.mask[time])
            middle = (rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2
            assert np.abs(clip.positions[time, 0] - middle).max() < _size(source) / 5


def test_no_image_is_in_both_splits_and_every_class_is_in_each() -> None:
    images, classes = {}, {}
    for split in ("train", "test"):
        source = MovingDigits(frames=1, height=16, width=16, num_digits=200, split=split)
        clips = [source[index] for index in range(8)]
        images[split] = {int(image) for clip in clips for image in clip.images}
        classes[split] = {int(digit) for clip in clips for digit in clip.digits}
    assert not images["train"] & images["test"]
    assert min(map(len, images.values())) > 300
    assert classes["train"] == classes["test"] == set(range(10))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"frames": 0}, "frames is 0"),
        ({"height": 8}, "height 8"),
        ({"fps": 0.0}, "fps is 0"),
        ({"num_digits": 256}, "num_digits is 256"),
        ({"digit_size": 200}, "digit_size is 200, expected 8 to the short side, 128"),
        ({"speed": (2.0, 1.0)}, "speed is"),
        ({"split": "valid"}, "split is 'valid', expected train or test"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_arguments_that_cannot_be(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MovingDigits(**changes)
