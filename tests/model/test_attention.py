"""Attention backends are exact and interchangeable; a sequence sees itself alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastjepa.model.attention import BACKENDS, attend
from fastjepa.model.segments import Segment, segments_of

shapes = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9)), min_size=1, max_size=3)


@settings(max_examples=40, deadline=None)
@given(shapes, st.sampled_from(BACKENDS))
def test_every_backend_is_the_formula_on_each_sequence(
    sizes: list[tuple[int, int]], backend: str
) -> None:
    segments = segments_of(sizes)
    qkv = torch.randn(segments[-1].stop, 3, 2, 8, dtype=torch.float64)
    out = attend(qkv, segments, backend=backend)
    expected = torch.empty_like(out)
    start = 0
    for count, length in sizes:
        for _ in range(count):
            q, k, v = qkv[start : start + length].unbind(1)
            for head in range(2):
                scores = (q[:, head] @ k[:, head].t()) / 8**0.5
                expected[start : start + length, head] = scores.softmax(-1) @ v[:, head]
            start += length
    torch.testing.assert_close(out, expected)


def test_segments_lie_behind_one_another() -> None:
    assert segments_of([(2, 3), (1, 4)]) == (Segment(0, 2, 3), Segment(6, 1, 4))
    rows = torch.arange(10)[:, None]
    assert segments_of([(2, 3), (1, 4)])[1].rows(rows).tolist() == [[[6], [7], [8], [9]]]


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(
        ValueError, match="attention: expected one of auto, sdpa, math, got 'quick'"
    ):
        attend(torch.zeros(2, 3, 1, 8), segments_of([(1, 2)]), backend="quick")
