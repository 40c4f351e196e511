"""Pictures to a video file by PyAV: what the synthetic sources, the self-test and the tests write.

write_video(Path("clip.mp4"), pictures, "h264", fps=24)
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import count
from pathlib import Path
from typing import cast

import av
from av.video.stream import VideoStream

from fastjepa.data.decoder import Frame
from fastjepa.durable import whole_file


@dataclass(frozen=True)
class Encoding:
    """How a codec is written: FFmpeg's encoder, the usual ending of the file, fast settings."""

    encoder: str
    suffix: str
    options: Mapping[str, str] = field(default_factory=dict)
    pix_fmt: str = "yuv420p"


_VPX = {"deadline": "realtime", "cpu-used": "8", "g": "24"}
CODECS: dict[str, Encoding] = {
    # Without the last, x264's assembly reads memory of its own that it has not written: the bytes
    # of a small video then vary from run to run.
    "h264": Encoding(
        "libx264", ".mp4", {"preset": "veryfast", "g": "24", "x264-params": "cpu-independent=1"}
    ),
    # With B-frames x265 leaves the decoding times of very short videos to chance.
    "hevc": Encoding(
        "libx265",
        ".mp4",
        {"preset": "ultrafast", "x265-params": "log-level=none:keyint=24:pools=1:bframes=0"},
    ),
    "vp9": Encoding("libvpx-vp9", ".webm", _VPX),
    "vp8": Encoding("libvpx", ".webm", _VPX),
    # Faster presets leave blocks of hard pictures as they were.
    "av1": Encoding("libsvtav1", ".mp4", {"preset": "8", "g": "24", "svtav1-params": "lp=1"}),
    "mpeg4": Encoding("mpeg4", ".mp4", {"g": "24", "bf": "2"}),
    "mjpeg": Encoding("mjpeg", ".avi", pix_fmt="yuvj420p"),
}


def encodable() -> list[str]:
    """Those of CODECS that this PyAV can encode."""
    return [name for name, encoding in CODECS.items() if encoding.encoder in av.codecs_available]


def write_video(
    path: Path,
    pictures: Iterable[Frame],
    codec: str | Encoding = "h264",
    *,
    fps: float | Fraction = 24,
    options: Mapping[str, str] | None = None,
    container_options: Mapping[str, str] | None = None,
    pix_fmt: str | None = None,
    pts: Iterable[int] | None = None,
    tick: Fraction | None = None,
    rotation: float | None = None,
) -> Path:
    """Encode uint8 [H, W, 3] pictures of one size; `path` holds the whole video or is not touched.

    `codec` is a name in CODECS, whose settings `options` (the encoder's own) adds to, or an
    Encoding. Frame k is shown at k / `fps` seconds, or at `pts[k]` times `tick` seconds; the
    display matrix turns it by `rotation` degrees counterclockwise. Raises ValueError for a codec
    that is unknown or that this PyAV cannot encode, and when there is no picture.
    """
    encoding = check_codec(codec) if isinstance(codec, str) else codec
    rate = Fraction(fps).limit_denominator(1001)
    unit = tick or 1 / rate
    # SVT-AV1 tells its settings on stderr otherwise.
    os.environ.setdefault("SVT_LOG", "1")
    with (
        _scheduling_kept(),
        whole_file(path) as temporary,
        av.open(str(temporary), "w", options=dict(container_options or {})) as container,
    ):
        stream: VideoStream | None = None
        for picture, time in zip(pictures, count() if pts is None else pts, strict=False):
            if stream is None:
                settings = {**encoding.options, **(options or {})}
                stream = cast(
                    VideoStream,
                    container.add_stream(encoding.encoder, rate=rate, options=settings),
                )
                stream.height, stream.width = picture.shape[:2]
                stream.pix_fmt = pix_fmt or encoding.pix_fmt
                stream.time_base = stream.codec_context.time_base = unit
                # The bytes must not depend on the machine; libvpx's threads spin besides.
                stream.codec_context.thread_count = 1
                if rotation is not None:
                    stream.set_display_rotation(rotation)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time, unit
            container.mux(stream.encode(frame))
        if stream is None:
            raise ValueError(f"{path}: no picture to write")
        container.mux(stream.encode())
    return path


@contextmanager
def _scheduling_kept() -> Iterator[None]:
    """As root SVT-AV1 makes the thread that opens it, and so all that this starts later, real-time:
    one that spins then keeps a core from everything else."""
    if not hasattr(os, "sched_getscheduler"):
        yield
        return
    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        if os.sched_getscheduler(0) != policy:
            os.sched_setscheduler(0, policy, priority)


def check_codec(codec: str) -> Encoding:
    """The settings of a codec. Raises ValueError if it is unknown or this PyAV cannot encode it."""
    if codec not in CODECS:
        raise ValueError(f"codec is {codec!r}, expected one of {', '.join(CODECS)}")
    if codec not in encodable():
        raise ValueError(
            f"codec {codec}: this PyAV has no {CODECS[codec].encoder}; "
            f"it encodes {', '.join(encodable())}"
        )
    return CODECS[codec]
