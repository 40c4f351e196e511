"""Packets of real streams: where a decoder may start, how many pictures are shown, of what size."""

from collections.abc import Callable
from pathlib import Path

import av
import pytest

from fastjepa.data.bitstream import CODECS, Coded, read_packet

ENCODINGS = {
    "vp8": ("a.webm", "libvpx", "yuv420p", {"g": "12"}),
    "vp9": ("a.webm", "libvpx-vp9", "yuv420p", {"g": "12", "lag-in-frames": "25"}),
    "vp9 without subsampling": ("a.webm", "libvpx-vp9", "yuv444p", {"g": "12"}),
    "vp9 of rgb": ("a.webm", "libvpx-vp9", "gbrp", {"g": "12"}),
    "mjpeg": ("a.mkv", "mjpeg", "yuvj420p", {}),
    "h264": ("a.mp4", "libx264", "yuv420p", {"g": "12"}),
    "h264 in a stream": ("a.ts", "libx264", "yuv420p", {"g": "12"}),
    "hevc": ("a.mp4", "libx265", "yuv420p", {"x265-params": "log-level=none:keyint=12"}),
    "hevc in a stream": ("a.ts", "libx265", "yuv420p", {"x265-params": "log-level=none:keyint=12"}),
}


def _packets(path: Path) -> list[tuple[Coded, bool]]:
    with av.open(str(path)) as container:
        codec = container.streams.video[0].codec_context.codec.canonical_name
        packets = [packet for packet in container.demux(video=0) if packet.size]
        return [(read_packet(codec, bytes(p), p.is_keyframe), p.is_keyframe) for p in packets]


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_stream_of_one_size(tmp_path: Path, write_video: Callable, name: str) -> None:
    file, codec, pix_fmt, options = ENCODINGS[name]
    path = write_video(tmp_path / file, codec, pix_fmt=pix_fmt, options=options)
    packets = _packets(path)
    assert len(packets) == 48
    assert all(coded.shown == 1 for coded, _ in packets)
    assert len(frozenset().union(*(coded.shapes for coded, _ in packets))) <= 1
    assert [coded.starts for coded, _ in packets] == [keyframe for _, keyframe in packets]


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "suffix"),
    [
        ("libvpx", "yuv420p", ".webm"),
        ("libvpx-vp9", "yuv420p", ".webm"),
        ("libvpx-vp9", "yuv444p", ".webm"),
        ("mjpeg", "yuvj420p", ".mkv"),
        ("libx264", "yuv420p", ".ts"),
        ("libx265", "yuv420p", ".ts"),
    ],
)
def test_two_sizes_are_two_shapes(
    tmp_path: Path, write_video: Callable, codec: str, pix_fmt: str, suffix: str
) -> None:
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    shapes = [
        coded.shapes
        for width in (64, 128)
        for coded, _ in _packets(
            write_video(
                tmp_path / f"{width}{suffix}", codec, pts=range(4), width=width, pix_fmt=pix_fmt,
                options=options,
            )
        )
    ]  # fmt: skip
    assert len(frozenset().union(*shapes)) == 2


def test_an_open_gop_starts_at_idr_pictures_alone(tmp_path: Path, write_video: Callable) -> None:
    options = {"bf": "3", "x264-params": "open-gop=1:keyint=12:b-adapt=0"}
    packets = _packets(write_video(tmp_path / "a.mkv", "libx264", options=options))
    assert sum(keyframe for _, keyframe in packets) > 2
    assert [coded.starts for coded, _ in packets] == [True] + [False] * 47


def test_hidden_pictures(tmp_path: Path, write_video: Callable) -> None:
    """The bit that shows a picture, taken away."""
    for codec, name, bit in (("libvpx", "vp8", 0x10), ("libvpx-vp9", "vp9", 0x02)):
        path = write_video(tmp_path / f"{name}.webm", codec, pts=range(2), options={"g": "1"})
        with av.open(str(path)) as container:
            data = bytearray(bytes(next(container.demux(video=0))))
        assert read_packet(name, bytes(data), True).shown == 1
        data[0] &= ~bit
        assert read_packet(name, bytes(data), True).shown == 0


@pytest.mark.parametrize("codec", CODECS)
def test_random_bytes_are_read_without_an_error(codec: str) -> None:
    import random

    random.seed(0)
    for length in (1, 2, 3, 5, 9, 40, 400):
        for _ in range(200):
            read_packet(codec, random.randbytes(length), True)
