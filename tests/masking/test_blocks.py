"""Block sizes and places: pure functions of (seed, step, rank, sample)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastjepa.masking.blocks import Blocks, block_size, covered

GRID = (8, 16, 16)
VIDEO = Blocks(num_blocks=8, spatial_scale=(0.15, 0.15))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 2**31), st.integers(0, 3))
def test_sizes_stay_in_their_ranges(seed: int, step: int, group: int) -> None:
    blocks = Blocks(4, (0.1, 0.5), (0.3, 0.9), (0.5, 2.0))
    t, h, w = block_size(blocks, GRID, seed=seed, step=step, group=group)
    assert 2 <= t <= 7
    # The area is floor(256 u), height and width its sides rounded.
    assert 25 - 4 <= h * w <= 128 + 16
    assert 0.4 <= h / w <= 2.5
    assert (t, h, w) == block_size(blocks, GRID, seed=seed, step=step, group=group)


def test_one_scale_and_aspect_give_the_specifications_size() -> None:
    square = Blocks(1, (0.15, 0.15), aspect_ratio=(1.0, 1.0))
    # keep = int(256 * 0.15) = 38, its root 6.16.
    assert block_size(square, GRID, seed=0, step=0, group=0) == (8, 6, 6)
    wide = Blocks(1, (0.7, 0.7), aspect_ratio=(0.25, 0.25))
    # keep = 179: 6.7 by 26.8, cut to the grid.
    assert block_size(wide, GRID, seed=0, step=0, group=0) == (8, 7, 16)
    short = Blocks(1, (0.15, 0.15), temporal_scale=(0.01, 0.01), aspect_ratio=(1.0, 1.0))
    assert block_size(short, GRID, seed=0, step=0, group=0)[0] == 1


def cover(blocks: Blocks = VIDEO, **changes: object) -> np.ndarray:
    arguments: dict[str, object] = {
        "seed": 3, "step": 5, "rank": 0, "samples": range(4), "group": 0,
    }  # fmt: skip
    return covered(blocks, GRID, **{**arguments, **changes})  # type: ignore[arg-type]


def test_the_same_call_gives_the_same_blocks_and_each_part_of_the_key_counts() -> None:
    first = cover()
    assert np.array_equal(first, cover())
    for change in ({"seed": 4}, {"step": 6}, {"rank": 1}, {"group": 1}):
        assert not np.array_equal(first, cover(**change)), change
    assert not np.array_equal(first[0], first[1])


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 9), st.integers(1, 9))
def test_a_samples_blocks_depend_on_no_other_sample(step: int, some: int, more: int) -> None:
    small, large = (
        cover(step=step, samples=range(some)),
        cover(step=step, samples=range(some + more)),
    )
    assert np.array_equal(small, large[:some])
    assert np.array_equal(cover(step=step, samples=[some]), large[some : some + 1])


def test_samples_of_one_step_share_the_block_size() -> None:
    one = Blocks(1, (0.1, 0.6), (0.2, 0.9), (0.5, 2.0))
    masks = cover(one, samples=range(20))
    size = block_size(one, GRID, seed=3, step=5, group=0)
    for mask in masks:
        sides = [np.flatnonzero(mask.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
        assert tuple(len(side) for side in sides) == size
        assert int(mask.sum()) == size[0] * size[1] * size[2]


def test_places_are_uniform_over_the_room() -> None:
    one = Blocks(1, (0.25, 0.25), aspect_ratio=(1.0, 1.0))
    masks = covered(one, (1, 9, 9), seed=0, step=0, rank=0, samples=range(3000), group=0)
    # int(81 / 4) = 20 makes a block of 4 by 4: six rows and columns to start in.
    rows, columns = (masks[:, 0].any(axis=axis).argmax(axis=-1) for axis in (2, 1))
    for corner in (rows, columns):
        counts = np.bincount(corner, minlength=6)
        assert len(counts) == 6
        assert abs(counts - 500).max() < 100
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.06


def test_context_is_left_even_when_most_draws_cover_everything() -> None:
    greedy = Blocks(40, (0.35, 0.35), aspect_ratio=(1.0, 1.0))
    masks = covered(greedy, (1, 4, 4), seed=0, step=0, rank=0, samples=range(50), group=0)
    assert not masks.all(axis=(1, 2, 3)).any()


def test_late_frames_are_no_context() -> None:
    masks = cover(Blocks(1, (0.15, 0.15), temporal_scale=(0.25, 0.25), max_temporal_keep=0.5))
    assert masks[:, 4:].all()
    assert not masks[:, :4].all()


def test_blocks_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"spatial_scale \(0.001, 0.001\) makes empty blocks"):
        block_size(Blocks(1, (0.001, 0.001)), GRID, seed=0, step=0, group=0)
    with pytest.raises(ValueError, match=r"1 blocks of .* cover the whole grid"):
        cover(Blocks(1, (1.0, 1.0), aspect_ratio=(1.0, 1.0)))
