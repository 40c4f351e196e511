"""The frame of a time is the last one not later."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastjepa.data.frame_times import clip_times, seconds_of, shown_at


@given(
    length=st.floats(0.0, 100.0),
    fraction=st.floats(0.0, 1.0, exclude_max=True),
    frames=st.integers(1, 64),
    fps=st.sampled_from([1.0, 4.0, 7.5, 30.0]),
)
def test_a_clip_lies_within_the_video_or_starts_with_it(
    length: float, fraction: float, frames: int, fps: float
) -> None:
    times = clip_times(length, fraction, frames, fps)
    assert len(times) == frames
    assert times[0] >= 0.0
    assert times[-1] - times[0] == pytest.approx((frames - 1) / fps)
    if length >= frames / fps:
        assert times[-1] + 1 / fps <= length + 1e-9
    else:
        assert times[0] == 0.0


@given(st.lists(st.integers(0, 50), min_size=1, unique=True), st.lists(st.integers(-5, 60)))
def test_the_last_frame_that_is_not_later(starts: list[int], times: list[int]) -> None:
    starts.sort()
    for time, index in zip(times, shown_at(times, starts), strict=True):
        assert index == max([i for i, start in enumerate(starts) if start <= time], default=0)


@pytest.mark.parametrize("tick", [1 / 1000, 1 / 90_000, 1 / 24, 1 / 30])
@pytest.mark.parametrize("rate", [24, 25, 30, 60])
def test_a_timestamp_rounded_up_to_a_tick_is_still_in_time(tick: float, rate: int) -> None:
    for number in range(200):
        rounded = round(number / rate / tick)
        late = rounded * tick - number / rate
        if late <= 0.0005:
            assert seconds_of(rounded + 7, 7, tick) <= number / rate
        assert seconds_of(rounded + 7, 7, tick) > rounded * tick - 0.00051
