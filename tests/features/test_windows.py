"""Long videos: windows cover every picture, and their blended features are one sequence."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastjepa.features.windows import Blend, windows


def pictures(count: int) -> list[np.ndarray]:
    """Picture k holds the number k."""
    return [np.full((3, 2, 2), number, np.uint8) for number in range(count)]


lengths = st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(0, 4)).filter(
    lambda t: t[2] < t[1]
)


@settings(deadline=None)
@given(st.integers(1, 40), lengths)
def test_windows_are_whole_and_cover_all(count: int, sizes: tuple[int, int, int]) -> None:
    tubelet, length, overlap = sizes[0], sizes[0] * sizes[1], sizes[0] * sizes[2]
    found = list(windows(pictures(count), length, overlap, tubelet))
    assert [last for *_, last in found] == [False] * (len(found) - 1) + [True]
    padded = count if count == 1 else count + -count % tubelet
    seen: set[int] = set()
    for first, clip, _ in found:
        start, frames = first * tubelet, clip.shape[1]
        assert frames == min(length, padded)
        expected = [min(number, count - 1) for number in range(start, start + frames)]
        assert clip[0, :, 0, 0].tolist() == expected
        seen |= set(range(start, start + frames))
    assert seen == set(range(padded))
    firsts = [first * tubelet for first, *_ in found]
    assert all(0 < b - a <= length - overlap for a, b in itertools.pairwise(firsts))


def features_of(clip: Tensor, tubelet: int) -> Tensor:
    """An encoder that sees one tubelet at a time: the same in every window."""
    steps = clip[:, ::tubelet].permute(1, 2, 3, 0)
    return steps.float()


@settings(deadline=None)
@given(st.integers(2, 40), lengths, st.randoms())
def test_what_does_not_depend_on_the_window_is_left_as_it_is(
    count: int, sizes: tuple[int, int, int], random: object
) -> None:
    tubelet, length, overlap = sizes[0], sizes[0] * sizes[1], sizes[0] * sizes[2]
    found = list(windows(pictures(count), length, overlap, tubelet))
    random.shuffle(found)  # type: ignore[attr-defined]
    blend = Blend()
    blend.expect(len(found))
    complete = [blend.add(first, {5: features_of(clip, tubelet)}) for first, clip, _ in found]
    assert complete == [False] * (len(found) - 1) + [True]
    whole = torch.from_numpy(np.stack(pictures(count), axis=1))
    torch.testing.assert_close(blend.result()[5], features_of(whole, tubelet))


def test_the_middle_of_a_window_counts_most() -> None:
    blend = Blend()
    for first, value in ((0, 0.0), (2, 1.0)):
        blend.add(first, {0: torch.full((4, 1, 1, 1), value, dtype=torch.bfloat16)})
    found = blend.result()[0]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(
        found.flatten().float(), torch.tensor([0, 0, 1 / 3, 2 / 3, 1, 1]), atol=4e-3, rtol=0
    )


@pytest.mark.parametrize(("length", "overlap"), [(5, 2), (4, 1), (4, 4), (4, -2)])
def test_windows_that_cannot_be_are_refused(length: int, overlap: int) -> None:
    with pytest.raises(ValueError, match=f"windows of {length} frames, overlap {overlap}"):
        list(windows(pictures(3), length, overlap, 2))
