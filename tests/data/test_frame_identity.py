"""Every frame is the one asked for, and a loader that gives another is found out."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastjepa.data.encode import encodable
from fastjepa.data.frame_identity import count_wrong_frames
from fastjepa.data.loader import Loader
from fastjepa.data.media import decode_media
from fastjepa.data.numbered import NumberedVideo, write_numbered


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[NumberedVideo]:
    """Three files of each codec, of several lengths and rates; some shorter than a clip."""
    folder = tmp_path_factory.mktemp("numbered")
    shapes = [(48, 24.0), (90, 30.0), (15, 25.0)]
    return [
        write_numbered(folder, 3 * number + i, codec=codec, frames=frames, fps=fps)
        for number, codec in enumerate(encodable())
        for i, (frames, fps) in enumerate(shapes)
    ]


@pytest.mark.parametrize(
    ("workers", "batches", "fps"), [(0, (1, 3, 32), 7.0), (2, (8,), 7.0), (0, (4,), 30.0)]
)
def test_no_wrong_frame(
    videos: list[NumberedVideo], workers: int, batches: tuple[int, ...], fps: float
) -> None:
    count = count_wrong_frames(
        videos, partial(Loader, workers=workers), batches=batches, clips=64, fps=fps
    )
    assert count.wrong == [], str(count)
    assert set(count.looked_at) == set(encodable())
    assert count.looked_at.total() >= 64 * 8 * len(batches)
    assert str(count).endswith("each the one asked for")


def _late(*args: Any, fps: float, **settings: Any) -> np.ndarray:
    """The frame after the one asked for."""
    clip = decode_media(*args, fps=24.0, **{**settings, "frames": 64})
    times = np.minimum(np.arange(settings["frames"]) * 24.0 / fps + 1, 63)
    return clip[times.astype(int)]


def _other_file(path: str, *args: Any, **settings: Any) -> np.ndarray:
    place = Path(path)
    return decode_media(str(place.with_stem(f"{int(place.stem) ^ 1}")), *args, **settings)


def _empty_end(*args: Any, **settings: Any) -> np.ndarray:
    clip = decode_media(*args, **settings)
    clip[-1] = 0
    return clip


def _shuffled(*args: Any, **settings: Any) -> np.ndarray:
    return np.ascontiguousarray(decode_media(*args, **settings)[::-1])


@pytest.mark.parametrize(
    ("decoder", "share", "words"),
    [
        (_late, 0.5, "was asked for, frame"),
        (_other_file, 1.0, r"of video 0 was asked for, frame \d+ of video 1 came"),
        (_empty_end, 1 / 8, "no number came"),
        (_shuffled, 0.8, "was asked for, frame"),
    ],
)
def test_wrong_frames_are_counted(
    tmp_path: Path, decoder: Callable, share: float, words: str
) -> None:
    videos = [write_numbered(tmp_path, number, codec="mpeg4") for number in (0, 1)]
    count = count_wrong_frames(videos, partial(Loader, decoder=decoder), batches=(4,), clips=16)
    assert len(count.wrong) >= share * count.looked_at.total()
    assert any(re.search(words, sentence) for sentence in count.wrong)
    assert str(count).startswith(f"{len(count.wrong)} wrong in 128 frames of mpeg4: ")


def test_a_file_called_bad_is_wrong(tmp_path: Path) -> None:
    videos = [write_numbered(tmp_path, number, codec="mpeg4") for number in (0, 1)]
    videos[1].path.write_bytes(b"")
    count = count_wrong_frames(videos, batches=(4,), clips=16)
    assert any(s == f"{videos[1].path} is called bad: the file is empty" for s in count.wrong)
