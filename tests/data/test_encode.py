"""Pictures written as a video come back; a file is whole or not there."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fastjepa.data.decode_pyav import decode_clip
from fastjepa.data.encode import CODECS, encodable, write_video


def _shades(number: int) -> Iterator[np.ndarray]:
    return (np.full((64, 80, 3), 16 * k + 8, np.uint8) for k in range(number))


@pytest.mark.parametrize("codec", encodable())
def test_each_codec_brings_its_pictures_back(tmp_path: Path, codec: str) -> None:
    path = write_video(tmp_path / f"a{CODECS[codec].suffix}", _shades(12), codec, fps=12)
    clip = decode_clip(str(path), 0.0, 12, 12.0)
    assert clip.shape == (12, 64, 80, 3)
    error = np.abs(clip.mean((1, 2, 3)) - [16 * k + 8 for k in range(12)])
    assert error.max() < 6
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("codec", encodable())
def test_few_pictures_are_a_video_every_time(tmp_path: Path, codec: str) -> None:
    for number in (1, 2) * 4:
        path = write_video(tmp_path / f"a{CODECS[codec].suffix}", _shades(number), codec)
        assert decode_clip(str(path), 0.0, number, 24.0).shape == (number, 64, 80, 3)


def test_encoders_say_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for codec in encodable():
        write_video(tmp_path / f"a{CODECS[codec].suffix}", _shades(2), codec)
    assert capfd.readouterr() == ("", "")


def test_pictures_that_fail_midway_leave_the_old_file(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", _shades(3), "mpeg4")
    before = path.read_bytes()

    def broken() -> Iterator[np.ndarray]:
        yield from _shades(2)
        raise OSError("no more pictures")

    with pytest.raises(OSError, match="no more pictures"):
        write_video(path, broken(), "mpeg4")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"codec is 'h265', expected one of h264, hevc"):
        write_video(tmp_path / "a.mp4", _shades(2), "h265")
    with pytest.raises(ValueError, match=r"a\.mp4: no picture to write"):
        write_video(tmp_path / "a.mp4", [], "mpeg4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="no schedulers to ask for")
@pytest.mark.parametrize("codec", encodable())
def test_the_process_is_scheduled_as_before(codec: str, tmp_path: Path) -> None:
    """SVT-AV1 makes it a real-time one, as root."""
    before = os.sched_getscheduler(0), os.sched_getparam(0).sched_priority
    write_video(tmp_path / "v.mkv", [np.zeros((64, 64, 3), np.uint8)] * 3, codec)
    assert (os.sched_getscheduler(0), os.sched_getparam(0).sched_priority) == before
