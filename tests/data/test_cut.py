"""What is cut out of a file holds the very pictures that PyAV reads from the whole file."""

import io
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastjepa.data.clip_plan import Box
from fastjepa.data.cut import Cut, Operators, cut_clip
from fastjepa.data.decode_pyav import decode_clip
from fastjepa.data.decoder import DecodeError

EVERYTHING = Operators(frozenset({"vp8", "vp9", "mjpeg", "h264", "hevc"}))
OPEN_GOP = "open-gop=1:keyint=12:bframes=3:b-adapt=0"
ENCODINGS: dict[str, tuple[str, dict[str, str]]] = {
    "vp8.webm": ("libvpx", {"g": "10"}),
    "vp9.webm": ("libvpx-vp9", {"g": "30", "lag-in-frames": "25", "cpu-used": "8"}),
    "mjpeg.avi": ("mjpeg", {}),
    "h264.mp4": ("libx264", {"g": "12", "bf": "4", "x264-params": "b-adapt=0:b-pyramid=normal"}),
    "h264.ts": ("libx264", {"g": "10"}),
    "one-keyframe.mp4": ("libx264", {"g": "1000"}),
    "open-gop.mp4": ("libx264", {"x264-params": OPEN_GOP}),
    "open-gop-hevc.mkv": ("libx265", {"x265-params": f"log-level=none:{OPEN_GOP}"}),
    "open-gop-hevc.mp4": ("libx265", {"x265-params": f"log-level=none:{OPEN_GOP}"}),
}


def _whole(height: int, width: int) -> Box:
    return Box(0, 0, height, width)


def _cut(
    path: Path,
    start: float,
    frames: int,
    fps: float,
    operators: Operators = EVERYTHING,
    box: Callable[[int, int], Box] = _whole,
    flip: bool = False,
) -> tuple[bytearray, Cut] | None:
    return cut_clip(
        str(path),
        start_fraction=start,
        frames=frames,
        fps=fps,
        box=box,
        flip=flip,
        operators=operators,
    )


def _pictures(found: tuple[bytearray, Cut]) -> np.ndarray:
    """The cut decoded and put in order, as any decoder of numbered pictures would do it."""
    data, cut = found
    with av.open(io.BytesIO(data)) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack([pictures[cut.numbers[place]] for place in cut.places])


@pytest.mark.parametrize("name", ENCODINGS)
def test_the_same_pictures_as_from_the_whole_file(
    tmp_path: Path, write_video: Callable, name: str
) -> None:
    """Bit for bit, wherever the clip lies and however fast it runs."""
    codec, options = ENCODINGS[name]
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = write_video(tmp_path / name, codec, pts=range(96), options=options, pix_fmt=pix_fmt)
    cuts = 0
    for start in (0.0, 0.11, 0.24, 0.37, 0.5, 0.63, 0.76, 0.9, 0.999):
        for frames, fps in ((8, 6.0), (3, 1.0), (12, 24.0)):
            found = _cut(path, start, frames, fps)
            if found is not None:
                cuts += 1
                assert (_pictures(found) == decode_clip(str(path), start, frames, fps)).all()
    # Few decoders can start at an open GOP of H.264, or find a keyframe of a stream at once.
    assert cuts >= (1 if name in ("open-gop.mp4", "h264.ts") else 27)


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    gaps=st.lists(st.sampled_from([1, 2, 20, 33, 40, 300, 900]), min_size=1, max_size=60),
    start=st.floats(0.0, 1.0, exclude_max=True),
    fps=st.sampled_from([2.0, 4.0, 10.0]),
    keyframes=st.sampled_from(["1", "5", "100"]),
)
def test_variable_frame_rate(
    tmp_path: Path,
    write_video: Callable,
    gaps: list[int],
    start: float,
    fps: float,
    keyframes: str,
) -> None:
    """Whatever the times, the cut's are even: no decoder has to understand them."""
    pts = [sum(gaps[:i]) for i in range(len(gaps) + 1)]
    options = {"g": keyframes, "preset": "ultrafast"}
    path = write_video(tmp_path / "a.mp4", pts=pts, tick=Fraction(1, 1000), options=options)
    found = _cut(path, start, 6, fps)
    assert found is not None
    assert (_pictures(found) == decode_clip(str(path), start, 6, fps)).all()
    with av.open(io.BytesIO(found[0])) as container:
        times = sorted(packet.pts for packet in container.demux(video=0) if packet.size)
    assert set(np.diff(times)) <= {40}


def test_a_picture_shown_twice_is_decoded_once(tmp_path: Path, write_video: Callable) -> None:
    path = write_video(tmp_path / "short.webm", "libvpx-vp9", pts=range(12))
    found = _cut(path, 0.0, 6, 4.0)
    assert found is not None
    assert found[1].numbers == (0, 6, 11)
    assert found[1].places == (0, 1, 2, 2, 2, 2)


def test_pictures_before_a_keyframe_are_asked_for_all_or_none(
    tmp_path: Path, write_video: Callable
) -> None:
    """So that a decoder which jumps to keyframes never lands before pictures it cannot decode."""
    params = f"log-level=none:{OPEN_GOP}"
    path = write_video(
        tmp_path / "a.mkv", "libx265", pts=range(96), options={"x265-params": params}
    )
    extra = 0
    for start in np.linspace(0.0, 0.99, 30):
        found = _cut(path, float(start), 4, 2.0)
        assert found is not None
        data, cut = found
        with av.open(io.BytesIO(data)) as container:
            sent = [(p.pts, p.is_keyframe) for p in container.demux(video=0) if p.size]
        order = sorted(pts for pts, _ in sent)
        keyframe = sent[0][0]
        for pts, is_keyframe in sent:
            keyframe = pts if is_keyframe else keyframe
            if pts < keyframe:
                assert {order.index(pts), order.index(keyframe)} <= set(cut.numbers)
        extra += len(cut.numbers) > 4
    assert extra


def test_a_long_video_costs_no_more_than_a_short_one(tmp_path: Path, write_video: Callable) -> None:
    options = {"g": "24", "deadline": "realtime", "cpu-used": "8"}
    sizes = []
    for frames in (96, 960):
        path = write_video(
            tmp_path / f"{frames}.webm", "libvpx-vp9", pts=range(frames), options=options
        )
        found = [_cut(path, start, 4, 4.0) for start in (0.1, 0.5, 0.9)]
        sizes.append(max(len(one[0]) for one in found if one))
    assert sizes[1] < 1.5 * sizes[0]


@pytest.mark.parametrize("name", ["a.webm", "a.mp4"])
def test_a_file_cut_off_is_cut_from_what_is_there(
    tmp_path: Path, write_video: Callable, name: str
) -> None:
    codec = "libvpx-vp9" if name.endswith("webm") else "libx264"
    path = write_video(
        tmp_path / name, codec, pts=range(96), options={"g": "8", "bf": "0"},
        container_options={"movflags": "faststart"} if name.endswith("mp4") else {},
    )  # fmt: skip
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * 0.6)])
    for start in (0.0, 0.3, 0.6, 0.999):
        found = _cut(path, start, 4, 12.0)
        if found is not None:
            assert (_pictures(found) == decode_clip(str(path), start, 4, 12.0)).all()
    assert _cut(path, 0.0, 4, 12.0) is not None


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("flip", [False, True])
def test_the_crop_is_that_of_the_upright_picture(
    tmp_path: Path, write_video: Callable, degrees: int, flip: bool
) -> None:
    path = write_video(
        tmp_path / "turned.mp4",
        pts=range(2),
        rotation=degrees,
        options={"qp": "0"},
        picture=lambda number, height, width: np.random.default_rng(0)
        .integers(0, 255, (height // 8, width // 8, 1), np.uint8)
        .repeat(8, 0).repeat(8, 1).repeat(3, 2),
    )  # fmt: skip
    box = Box(5, 8, 20, 11)
    found = _cut(path, 0.0, 1, 4.0, box=lambda height, width: box, flip=flip)
    assert found is not None
    top, left, bottom, right = found[1].corners
    rows = slice(top, bottom) if top < bottom else slice(top - 1, bottom - 1, -1)
    columns = slice(left, right) if left < right else slice(left - 1, right - 1, -1)
    picture = _pictures(found)[0][rows, columns]
    if found[1].transposed:
        picture = picture.transpose(1, 0, 2)
    upright = decode_clip(str(path), 0.0, 1, 4.0)[0][5:25, 8:19]
    assert (picture == (upright[:, ::-1] if flip else upright)).all()


def test_colours_lead_from_601_to_the_files_own(tmp_path: Path, write_video: Callable) -> None:
    """White stays white; BT.709's green, read as BT.601, comes back."""
    path = write_video(tmp_path / "a.webm", "libvpx-vp9", pts=range(2))
    found = _cut(path, 0.0, 1, 4.0)
    assert found is not None
    assert np.abs(np.array(found[1].colours).reshape(3, 3) - np.eye(3)).max() < 1e-12
    from fastjepa.data.cut import matrix_from_601

    matrix = np.array(matrix_from_601(1)).reshape(3, 3)
    assert np.abs(matrix.sum(1) - 1.0).max() < 1e-12
    # Green of BT.709 is Y 0.7152, Cb -0.3854, Cr -0.4542; by BT.601's formula, this colour:
    assert np.abs(matrix @ [0.0784, 1.1721, 0.0323] - [0.0, 1.0, 0.0]).max() < 2e-3


def _two_sizes(folder: Path, write_video: Callable) -> Path:
    parts = [
        write_video(folder / f"{w}.h264", pts=range(24), width=w, options={"g": "12"})
        for w in (64, 128)
    ]
    both = folder / "both.h264"
    both.write_bytes(b"".join(part.read_bytes() for part in parts))
    path = folder / "both.ts"
    with av.open(str(both), format="h264") as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(p for p in source.demux(video=0) if p.size):
            packet.stream, packet.time_base = stream, Fraction(1, 24)
            packet.pts = packet.dts = number
            target.mux(packet)
    return path


def test_files_that_only_ffmpeg_tells_apart_are_left_to_it(
    tmp_path: Path, write_video: Callable
) -> None:
    assert _cut(write_video(tmp_path / "a.mp4", "mpeg4"), 0.0, 4, 4.0) is None
    assert _cut(_two_sizes(tmp_path, write_video), 0.0, 8, 4.0) is None
    raw = write_video(tmp_path / "raw.h264", options={"bf": "0"})
    assert _cut(raw, 0.5, 4, 4.0) is None  # no timestamps
    strict = Operators(frozenset({"h264"}), frozenset({"yuv420p"}))
    assert _cut(write_video(tmp_path / "b.mp4"), 0.0, 4, 4.0, strict) is not None
    deep = write_video(tmp_path / "deep.mp4", pix_fmt="yuv420p10le")
    assert _cut(deep, 0.0, 4, 4.0, strict) is None
    odd = write_video(tmp_path / "odd.mp4", pix_fmt="yuv444p", width=67)
    assert _cut(odd, 0.0, 4, 4.0, strict) is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.touch(), "the file is empty"),
        (lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)), "cannot be opened"),
    ],
)
def test_a_file_without_a_clip_is_one_clear_error(
    tmp_path: Path, make: Callable[[Path], Any], words: str
) -> None:
    path = tmp_path / "bad.webm"
    make(path)
    with pytest.raises(DecodeError, match=words):
        _cut(path, 0.5, 4, 4.0)
