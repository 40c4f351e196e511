"""Files of the zoo cut for another decoder: FFmpeg's own pictures, and no others if damaged."""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from fastjepa.data.batch import Batch
from fastjepa.data.clip_plan import Box
from fastjepa.data.cut import Operators, cut_clip
from fastjepa.data.decode_dali import DaliDecoder, why_not
from fastjepa.data.decode_pyav import decode_clip
from fastjepa.data.decoder import DecodeError
from fastjepa.data.files import Entry
from fastjepa.data.loader import Loader

from .breakage import DAMAGED, FLIPPED
from .recipes import GOOD

FRACTIONS = (0.0, 0.37, 0.63, 0.999)
CUT = partial(
    cut_clip,
    box=lambda height, width: Box(0, 0, height, width),
    flip=False,
    operators=Operators(frozenset({"vp8", "vp9", "mjpeg", "h264", "hevc"})),
)
# Left to FFmpeg as a whole: other codecs, and files without times.
LEFT = {
    "av1.mp4", "av1-10bit.mp4", "mpeg4.mp4", "mpeg4.avi", "mpeg2.mpg", "mpeg2.ts", "wmv2.wmv",
    "flv1.flv", "theora.ogv", "ffv1-422-10bit.mkv", "animation.gif", "bare.h264", "bare.hevc",
    "no-timestamps.avi", "no-timestamps-b-frames.avi", "edit-list-open-gop.mp4", "interlaced.mp4",
}  # fmt: skip


def _decoded(data: bytearray) -> list[np.ndarray]:
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize("name", GOOD)
def test_a_cut_holds_the_pictures_of_the_file(zoo: Callable, name: str) -> None:
    path, cuts = str(zoo(name)), 0
    for frames, fps in ((6, 4.0), (12, 30.0)):
        for start in FRACTIONS:
            found = CUT(path, start_fraction=start, frames=frames, fps=fps)
            if found is not None:
                data, cut = found
                pictures = _decoded(data)
                clip = np.stack([pictures[cut.numbers[place]] for place in cut.places])
                assert (clip == decode_clip(path, start, frames, fps)).all()
                cuts += 1
    assert (cuts == 0) == (name in LEFT)


@pytest.mark.parametrize("name", [*DAMAGED, "bits-flipped.webm"])
def test_a_cut_of_a_damaged_file_is_no_better_than_the_file(
    zoo: Callable, tmp_path: Path, name: str
) -> None:
    """Where PyAV gives a clip, the cut gives the same."""
    source, change = {**DAMAGED, **FLIPPED}[name]
    path = tmp_path / name
    path.write_bytes(change(zoo(source).read_bytes()))
    for start in FRACTIONS:
        try:
            found = CUT(str(path), start_fraction=start, frames=5, fps=8.0)
            wanted = decode_clip(str(path), start, 5, 8.0)
        except DecodeError:
            continue
        if found is not None:
            data, cut = found
            pictures = _decoded(data)
            clip = np.stack([pictures[cut.numbers[place]] for place in cut.places])
            assert (clip == wanted).all()


def _first_batch(paths: list[Path], **changes: Any) -> Batch:
    loader = Loader(
        datasets=[([Entry(str(path), "video") for path in paths], 1.0)],
        **{"batch": 24, "frames": 5, "fps": 8.0, "crop": 64, "seed": 0, "max_bad_share": 1.0},
        **{"scale": (0.3, 1.0), "aspect": (0.75, 1.35), "flip": 0.5},
        **changes,
    )  # fmt: skip
    return next(loader.batches(0, 1))


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize(
    "names",
    [
        ["vp9.webm", "vp9-hidden-frames.webm", "vp9-10bit.webm", "vp9-odd.webm", "one-frame.webm"],
        ["vp8.webm", "vp8-odd.webm", "mjpeg.avi", "mjpeg.mov", "variable.webm"],
        ["h264.mp4", "hevc-open-gop.mp4", "av1.mp4", "mpeg4.avi", "turned-90.mp4"],
    ],
)
def test_dali_gives_the_brightness_of_pyav(zoo: Callable, names: list[str]) -> None:
    """The test picture's colours are harsher than any camera's, and spread differently."""
    paths = [zoo(name) for name in names]
    wanted = _first_batch(paths)
    found = _first_batch(
        paths, device_decoder=DaliDecoder(torch.device("cpu"), threads=1, normalised=False)
    )
    assert found.bad == wanted.bad == []
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1, 1)
    differences = ((found.clip.float() - wanted.clip.float()) * weights).sum(1).abs()
    assert differences.mean((1, 2, 3)).max() < 2.0
