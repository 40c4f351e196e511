"""What a media file is, found by reading all of it once: packets counted, two frames decoded."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import av
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image

from fastjepa.data.cache import Cache
from fastjepa.data.decode_image import decode_image
from fastjepa.data.decode_pyav import decode_clip, open_container, video_stream
from fastjepa.data.decoder import DecodeError, Frame
from fastjepa.data.files import Kind
from fastjepa.data.storage import open_media

# Counterclockwise degrees by EXIF orientation; mirrored ones by the turn that is in them.
_EXIF_TURNS = {3: 180, 4: 180, 5: 270, 6: 270, 7: 90, 8: 90}
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Facts:
    """What is known of a file; None for what could not be found, or has no meaning for an image.

    `frames` counts the packets that are there and shown, whatever the header says. `time_base` is
    a fraction of a second, `width` and `height` are as coded, `rotation` is counterclockwise
    degrees to be shown at, `duration` seconds. `reason` says why a file is not readable.
    """

    codec: str | None = None
    frames: int | None = None
    time_base: str | None = None
    fps: float | None = None
    width: int | None = None
    height: int | None = None
    rotation: int | None = None
    duration: float | None = None
    readable: bool = False
    reason: str | None = None


def probe(path: str, kind: Kind, cache: Cache) -> Facts:
    """Examine a file; readable is one whose first and middle frame can be decoded."""
    found: dict[str, Any] = {}
    try:
        _image(path, cache, found) if kind == "image" else _video(path, cache, found)
    except DecodeError as error:
        return Facts(**found, reason=error.reason)
    return Facts(**found, readable=True)


def _image(path: str, cache: Cache, found: dict[str, Any]) -> None:
    decode_image(path, _nothing, cache)
    with open_media(path, cache) as media, Image.open(media) as image:
        found |= {
            "codec": (image.format or "").lower(),
            "frames": 1,
            "width": image.width,
            "height": image.height,
            "rotation": _EXIF_TURNS.get(image.getexif().get(_ORIENTATION, 1), 0),
        }


def _video(path: str, cache: Cache, found: dict[str, Any]) -> None:
    try:
        with open_container(path, cache) as container:
            stream = video_stream(container, path)
            context = stream.codec_context
            found |= {
                "codec": context.codec.canonical_name,
                "time_base": str(stream.time_base),
                "fps": float(stream.average_rate or stream.guessed_rate or 0) or None,
                "width": context.width,
                "height": context.height,
            }
            _count(container, stream, found)
    except av.FFmpegError as error:
        raise DecodeError(path, f"cannot be decoded ({error.strerror})") from None
    for place in (0.0, 0.5):
        decode_clip(path, place, 1, 1000.0, _nothing, cache)


def _count(container: InputContainer, stream: VideoStream, found: dict[str, Any]) -> None:
    """Go through all packets; the first frame that comes tells the rotation."""
    assert stream.time_base is not None
    frames, end, rotation = 0, 0, None
    start = stream.start_time or 0
    hides = stream.codec_context.codec.canonical_name == "vp8"
    try:
        for packet in container.demux(stream):
            if not packet.size or packet.is_corrupt or packet.is_discard:
                continue
            # Nothing can be made of what comes before the first keyframe.
            if not frames and not packet.is_keyframe:
                continue
            # A VP8 packet may hold a frame that is only referred to (RFC 6386, 9.1: show_frame).
            frames += not hides or bytes(packet)[0] >> 4 & 1
            begin = end if packet.pts is None else packet.pts - start
            end = max(end, begin + (packet.duration or 0))
            if rotation is None:
                rotation = next((frame.rotation for frame in _decoded(packet.decode())), None)
    except av.FFmpegError:
        pass  # what was read before the broken place still counts
    found |= {"frames": frames, "rotation": rotation and rotation % 360}
    found["duration"] = float(end * stream.time_base)


def _decoded(frames: Any) -> Iterator[VideoFrame]:
    return (frame for frame in frames if not frame.is_corrupt)


def _nothing(frame: Frame) -> Frame:
    """Instead of augmenting: one pixel is enough to know that there is a picture."""
    return frame[:1, :1]
