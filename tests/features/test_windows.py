"""Long videos: windows cover every picture, and their blended features are one sequence."""

import itertools
import subprocess
import sys
from pathlib import Path

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


def weighted_means(parts: list[tuple[int, Tensor]]) -> Tensor:
    """The formula, with all windows at hand."""
    steps = max(first + len(x) for first, x in parts)
    total, weight = torch.zeros(steps, *parts[0][1].shape[1:]), torch.zeros(steps, 1, 1, 1)
    for first, x in parts:
        ramp = torch.arange(1.0, len(x) + 1)
        w = torch.minimum(ramp, ramp.flip(0)).view(-1, 1, 1, 1)
        total[first : first + len(x)] += w * x
        weight[first : first + len(x)] += w
    return total / weight


def test_blended_features_are_the_weighted_means_and_one_window_is_as_it_came() -> None:
    random = torch.Generator().manual_seed(0)
    parts = [(first, torch.randn(8, 2, 3, 5, generator=random)) for first in (0, 3, 6, 9, 11)]
    blend = Blend()
    for first, x in parts:
        blend.add(first, {2: x, 5: -x})
    expected = weighted_means(parts)
    found = blend.result()
    assert list(found) == [2, 5]
    assert torch.equal(found[2], expected)
    assert torch.equal(found[5], -expected)
    alone = Blend()
    alone.expect(1)
    assert alone.add(0, {2: parts[0][1]})
    assert torch.equal(alone.result()[2], parts[0][1])


MEASURE = """
import torch
from fastjepa.features.windows import Blend
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
def blended(steps):
    blend = Blend()
    for first in range(0, steps - 31, 8):
        blend.add(first, {0: torch.ones(32, 16, 16, 128)})
    return blend.result()[0]
blended(40)
before = peak()
size = blended(1024).nbytes
print(peak() - before, size)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_a_long_video_is_held_once_however_much_its_windows_overlap() -> None:
    """134 MB of features, each step in four windows: below 1.5 times that at the peak."""
    run = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True
    )
    grown, size = map(int, run.stdout.split())
    assert grown < 1.5 * size


@pytest.mark.parametrize(("length", "overlap"), [(5, 2), (4, 1), (4, 4), (4, -2)])
def test_windows_that_cannot_be_are_refused(length: int, overlap: int) -> None:
    with pytest.raises(ValueError, match=f"windows of {length} frames, overlap {overlap}"):
        list(windows(pictures(3), length, overlap, 2))
