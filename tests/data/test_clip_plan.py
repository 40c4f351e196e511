import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fastjepa.data.clip_plan import plan_clip, sample_index

AUGMENT = {"scale": (0.3, 1.0), "aspect": (0.75, 1.35), "flip": 0.5}
seeds = st.integers(0, 2**32 - 1)
indices = st.integers(0, 2**50)


@given(seeds, indices, st.integers(0, 300), st.integers(1, 3000), st.integers(1, 3000))
def test_the_box_lies_inside_any_picture(s: int, i: int, a: int, height: int, width: int) -> None:
    plan = plan_clip(s, i, a, **AUGMENT)
    box = plan.box(height, width)
    assert 0 <= box.top <= box.top + box.height <= height
    assert 0 <= box.left <= box.left + box.width <= width
    assert box.height > 0
    assert box.width > 0
    assert all(0.0 <= u < 1.0 for u in (plan.dataset, plan.file, plan.start))


@given(seeds, indices, st.integers(0, 300))
def test_a_plan_is_a_function_of_its_arguments(seed: int, index: int, attempt: int) -> None:
    np.random.seed(0)  # the global generator must not matter
    one = plan_clip(seed, index, attempt, **AUGMENT)
    two = plan_clip(seed, index, attempt, **AUGMENT)
    assert one[:4] == two[:4]
    assert (one.crops == two.crops).all()


@given(seeds, indices, st.integers(0, 300))
def test_neighbours_are_unrelated(seed: int, index: int, attempt: int) -> None:
    plans = [
        plan_clip(seed, index, attempt, **AUGMENT),
        plan_clip(seed + 1, index, attempt, **AUGMENT),
        plan_clip(seed, index + 1, attempt, **AUGMENT),
        plan_clip(seed, index, attempt + 1, **AUGMENT),
        plan_clip(seed, index, attempt, stream=1, **AUGMENT),
    ]
    numbers = {u for plan in plans for u in (plan.dataset, plan.file, plan.start)}
    assert len(numbers) == 15


def test_the_numbers_are_pinned() -> None:
    """A resumed run must meet the same clips after any update of NumPy or of this code."""
    plan = plan_clip(7, 123_456_789, 2, stream=1, **AUGMENT)
    assert [plan.dataset, plan.file, plan.start, plan.flip] == [
        0.2806756652727793,
        0.9488386866329103,
        0.7199438020358965,
        True,
    ]
    assert plan.box(480, 640) == (81, 156, 323, 358)


def test_draws_are_uniform_and_crops_distributed_as_the_reference() -> None:
    plans = [plan_clip(0, i, 0, **AUGMENT) for i in range(4000)]
    for values in ([p.dataset for p in plans], [p.file for p in plans], [p.start for p in plans]):
        shares = np.histogram(values, 10, (0.0, 1.0))[0] / 4000
        assert np.abs(shares - 0.1).max() < 0.02
    assert abs(np.mean([p.flip for p in plans]) - 0.5) < 0.03
    boxes = np.array([p.box(1000, 1000) for p in plans], float)
    area, aspect = boxes[:, 2] * boxes[:, 3] / 1e6, boxes[:, 3] / boxes[:, 2]
    assert area.min() > 0.295
    assert aspect.min() > 0.745
    assert aspect.max() < 1.355
    crops = np.concatenate([p.crops for p in plans])
    assert abs(crops[:, 0].mean() - 0.65) < 0.01
    expected = (math.log(0.75) + math.log(1.35)) / 2
    assert abs(np.log(crops[:, 1]).mean() - expected) < 0.01


def test_flip_never_and_always() -> None:
    for share, expected in ((0.0, False), (1.0, True)):
        augment = {**AUGMENT, "flip": share}
        assert {plan_clip(0, i, 0, **augment).flip for i in range(50)} == {expected}


def test_pictures_no_crop_fits_are_cut_in_the_middle() -> None:
    plan = plan_clip(0, 0, 0, scale=(1.0, 1.0), aspect=(0.75, 1.35), flip=0.0)
    assert plan.box(100, 1000) == ((0, (1000 - 135) // 2, 100, 135))
    assert plan.box(1000, 75) == ((450, 0, 100, 75))


@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 8))
def test_samples_are_numbered_without_gap_or_overlap(step: int, ranks: int, batch: int) -> None:
    numbers = [
        sample_index(s, rank=r, ranks=ranks, batch=batch, slot=slot)
        for s in (step, step + 1)
        for r in range(ranks)
        for slot in range(batch)
    ]
    first = step * ranks * batch
    assert numbers == list(range(first, first + 2 * ranks * batch))
