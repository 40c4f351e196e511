"""Which frames a clip shows: seconds of a clip, and timestamps to the frame on screen at each.

Times count in seconds from the start of the stream. The frame of time t is the one on screen at t:
the last whose timestamp is not later; before the first frame that is the first, after the end the
last.
"""

from bisect import bisect_right
from collections.abc import Sequence


def clip_times(length: float, start_fraction: float, frames: int, fps: float) -> list[float]:
    """Place a clip of `frames` frames, 1/`fps` s apart, in a video of `length` seconds.

    `start_fraction` in [0, 1) picks one of all places it fits; it starts at 0 where none does.
    """
    start = start_fraction * max(0.0, length - frames / fps)
    return [start + i / fps for i in range(frames)]


def seconds_of(timestamp: int, start: int, tick: float) -> float:
    """When a frame counts as on screen, for a timestamp in ticks of `tick` seconds from `start`.

    Containers round to ticks (1 ms in Matroska), so a frame may be marked up to half a tick late.
    """
    return (timestamp - start) * tick - (min(tick / 2.0, 0.0005) + 1e-6)


def shown_at(times: Sequence[float], seconds: Sequence[float]) -> list[int]:
    """Index of the frame on screen at each of `times`, given each frame's `seconds`, ascending."""
    return [max(0, bisect_right(seconds, time) - 1) for time in times]
