"""Every good file gives FFmpeg's own frames, bit for bit, at even times, wherever a clip lies."""

from collections.abc import Callable

import numpy as np
import pytest

from fastjepa.data.decode_pyav import decode_clip

from .recipes import GOOD, TURNED

DECODERS: dict[str, Callable[..., np.ndarray]] = {"pyav": decode_clip}
# Files keep times in ticks of up to a millisecond, a GIF in hundredths of a second.
TICK = {"animation.gif": 0.01}
# AVI keeps no times: those of B-frames are guessed, and may be one frame off after a seek.
GUESSED = {"no-timestamps-b-frames.avi": 1 / 24}


def _start(
    clip: np.ndarray, fps: float, frames: np.ndarray, times: np.ndarray, tick: float
) -> tuple[float, float]:
    """First and last time at which the clip can start, if its frames are those on screen then."""
    earliest, latest = -np.inf, np.inf
    ends = np.append(times[1:], np.inf)
    for i, picture in enumerate(clip):
        (same,) = np.nonzero((frames == picture).all((1, 2, 3)))
        assert same.size, f"picture {i} is none of FFmpeg's frames"
        begin = -np.inf if same[0] == 0 else times[same[0]]
        earliest = max(earliest, begin - i / fps - tick)
        latest = min(latest, ends[same[-1]] - i / fps + tick)
    assert earliest <= latest, "the pictures are not evenly spaced in time"
    return earliest, latest


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", [*GOOD, *TURNED])
def test_frames_are_those_of_ffmpeg(
    zoo: Callable, output_of: Callable, name: str, decoder: str
) -> None:
    path, wanted = str(zoo(name)), output_of(name)
    tick = TICK.get(name, 0.001) + GUESSED.get(name, 0.0)
    for frames, fps in ((8, 6.0), (12, 30.0)):
        for fraction in (0.0, 0.2, 0.37, 0.5, 0.63, 0.81, 0.999):
            clip = DECODERS[decoder](path, fraction, frames, fps)
            assert clip.shape == (frames, *wanted.frames.shape[1:])
            earliest, latest = _start(clip, fps, wanted.frames, wanted.times, tick)
            # Headers are off by a few frames (the delay of B-frames, sound that ends later).
            begin = fraction * max(0.0, wanted.length - frames / fps)
            assert earliest - 0.11 <= begin <= latest + 0.11


def test_the_zoo_can_tell_frames_apart(output_of: Callable) -> None:
    for name in ("h264.mp4", "variable.mp4", "edit-list.mp4", "animation.gif"):
        shown = output_of(name)
        assert len({frame.tobytes() for frame in shown.frames}) == len(shown.frames) > 15
    assert len(set(np.round(np.diff(output_of("variable.mp4").times), 3))) > 3
    assert output_of("turned-90.mp4").frames.shape[1:3] == (96, 64)
