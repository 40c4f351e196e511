"""Video clips by PyAV (FFmpeg) on the CPU: frames picked by timestamp, upright, RGB.

A frame is picked for being on screen at a time (frame_times.py), so variable frame rates need no
special care.
"""

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from fastjepa.data.cache import DEFAULT, Cache
from fastjepa.data.decoder import MAX_PIXELS, DecodeError, FrameTransform, check_size
from fastjepa.data.frame_times import clip_times, seconds_of
from fastjepa.data.storage import open_media
from fastjepa.data.turn import Turn, turn_of, upright
from fastjepa.data.wanted_frames import SEEK_MARGINS, read_wanted

# Files may be named by strangers: nothing but local files is opened, whatever a playlist inside one
# asks for; and nothing at all where the file itself is read through Python.
_BY_NAME = {"protocol_whitelist": "file"}
_THROUGH_PYTHON = {"protocol_whitelist": "none"}


@dataclass(frozen=True)
class _Shown:
    """A decoded frame and when it is shown, in seconds from the start of the stream."""

    time: float
    end: float
    frame: VideoFrame


def decode_clip(
    path: str,
    start_fraction: float,
    frames: int,
    fps: float,
    transform: FrameTransform | None = None,
    cache: Cache = DEFAULT,
) -> NDArray[Any]:
    """Read `frames` frames, 1/fps s apart: uint8 [T, H, W, 3], or `transform` of each, stacked.

    `start_fraction` in [0, 1) places the clip (frames/fps seconds long) between the file's start
    and end; a file shorter than the clip is read from its start, and its last frame repeated. Each
    frame is turned as the file's display matrix says and given to `transform` as uint8 [H, W, 3] at
    once, so big frames do not pile up.

    `path` is any address of storage.py; remote files go through `cache`.

    Where a file holds less than its header says (cut off in transfer), the clip is placed in what
    is there; frames that do not decode are never replaced by others. Raises DecodeError when there
    is no such clip.
    """
    read = partial(
        _read_clip,
        path,
        cache,
        start_fraction=start_fraction,
        frames=frames,
        fps=fps,
        transform=transform,
    )
    try:
        with open_container(path, cache) as container:
            length = header_length(container, video_stream(container, path))
            clip = None if length is None else read(container, length=length)
        if clip is None:
            length = _measured_length(path, cache)
            with open_container(path, cache) as container:
                clip = read(container, length=length)
    except av.FFmpegError as error:
        raise DecodeError(path, f"cannot be decoded ({error.strerror})") from None
    # PyAV makes a ring of a frame and its side data (turn_of), which would keep the decoder's
    # buffers until Python looks for rings by itself: megabytes a clip.
    gc.collect(1)
    if clip is None:
        raise DecodeError(path, f"frames are missing within its {length:.2f} s")
    return clip


def decode_whole(
    path: str, fps: float, transform: FrameTransform | None = None, cache: Cache = DEFAULT
) -> Iterator[NDArray[Any]]:
    """What is on screen every 1/fps s from a video's start to its end, one picture after the other.

    Pictures are as those of `decode_clip`, and so are its errors; a file is decoded once, in order.
    """
    picture, number, last = _Picture(path, transform), 0, None
    try:
        with open_container(path, cache) as container:
            stream = video_stream(container, path)
            for shown in _decode(path, container, stream, after_seek=False):
                while last is not None and number / fps < shown.time:
                    yield picture.of(last.frame)
                    number += 1
                last = shown
            if last is None:
                raise DecodeError(path, "holds no video frame", whole_file=True)
            while number == 0 or number / fps < last.end:
                yield picture.of(last.frame)
                number += 1
    except av.FFmpegError as error:
        raise DecodeError(path, f"cannot be decoded ({error.strerror})") from None


@contextmanager
def open_container(path: str, cache: Cache) -> Iterator[InputContainer]:
    """Open a media file wherever it is. Raises DecodeError."""
    with open_media(path, cache) as media:
        # The prefix keeps a colon in the name from being read as a protocol's.
        file, options = (
            (f"file:{media}", _BY_NAME) if isinstance(media, str) else (media, _THROUGH_PYTHON)
        )
        try:
            container = av.open(file, "r", options=options, metadata_errors="replace")
        except av.FFmpegError as error:
            reason = f"cannot be opened ({error.strerror})"
            if _is_empty(media):
                reason = "the file is empty"
            raise DecodeError(path, reason, whole_file=True) from None
        with container:
            yield container


def _is_empty(media: str | BinaryIO) -> bool:
    if isinstance(media, str):
        return os.path.isfile(media) and os.path.getsize(media) == 0
    return media.seek(0, os.SEEK_END) == 0


def video_stream(container: InputContainer, path: str) -> VideoStream:
    """The first video stream that is not a cover picture, ready to decode with one thread."""
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            break
    else:
        found = ", ".join(sorted({stream.type for stream in container.streams})) or "none"
        raise DecodeError(path, f"no video stream (streams: {found})", whole_file=True)
    if stream.codec_context is None:
        raise DecodeError(path, "no decoder for its video codec", whole_file=True)
    check_size(path, stream.codec_context.height, stream.codec_context.width)
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    stream.codec_context.thread_count = 1
    return stream


def header_length(container: InputContainer, stream: VideoStream) -> float | None:
    """Seconds of video by the header, or None where it does not say."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return None if container.duration is None else container.duration / av.time_base


def _measured_length(path: str, cache: Cache) -> float:
    """Seconds of video by the packets that are there and shown; nothing is decoded."""
    with open_container(path, cache) as container:
        stream = video_stream(container, path)
        tick, start = _tick(stream), stream.start_time or 0
        end = 0.0
        try:
            for packet in container.demux(stream):
                if packet.size and not packet.is_corrupt and not packet.is_discard:
                    begin = end if packet.pts is None else (packet.pts - start) * tick
                    end = max(end, begin + (packet.duration or 0) * tick)
        except av.FFmpegError:
            pass  # what was read before the broken place still counts
    if end <= 0.0:
        raise DecodeError(path, "holds no video frame", whole_file=True)
    return end


def _read_clip(
    path: str,
    cache: Cache,
    container: InputContainer,
    *,
    length: float,
    start_fraction: float,
    frames: int,
    fps: float,
    transform: FrameTransform | None,
) -> NDArray[Any] | None:
    """The clip placed in `length` seconds, or None when the frames end before the clip does."""
    times = clip_times(length, start_fraction, frames, fps)
    # At the end of the stream its last frame stays, for at most one frame of the clip unless the
    # file itself is over.
    reach = min(times[-1], length) - 1.0 / fps
    picked = read_wanted(
        container, video_stream(container, path), times, reach, _Picture(path, transform).of
    )
    if picked is None:
        with open_container(path, cache) as fresh:
            picked = _read_in_order(path, cache, fresh, times, reach, _Picture(path, transform))
    return None if picked is None else np.stack(picked)


def _read_in_order(
    path: str,
    cache: Cache,
    container: InputContainer,
    times: Sequence[float],
    reach: float,
    picture: "_Picture",
) -> list[NDArray[Any]] | None:
    """The frame on screen at each of `times` by decoding all from there on; None where the stream
    ends before `reach`."""
    picked: list[NDArray[Any]] = []
    last: _Shown | None = None
    for shown in _frames_around(path, cache, container, times[0]):
        while last and len(picked) < len(times) and times[len(picked)] < shown.time:
            picked.append(picture.of(last.frame))
        if len(picked) == len(times):
            return picked
        last = shown
    if last is None or last.end < reach:
        return None
    return picked + [picture.of(last.frame)] * (len(times) - len(picked))


def _frames_around(
    path: str, cache: Cache, container: InputContainer, time: float
) -> Iterator[_Shown]:
    """Frames in order of time, from one shown at `time` or before (or the first) to the last.

    `container` stands at its start.
    """
    stream = video_stream(container, path)
    if time <= 0.0 or stream.start_time is None:
        yield from _decode(path, container, stream, after_seek=False)
        return
    for margin in SEEK_MARGINS:
        offset = stream.start_time + int(max(0.0, time - margin) / _tick(stream))
        try:
            container.seek(offset, stream=stream)
        except av.FFmpegError:
            break
        shown = _decode(path, container, stream, after_seek=True)
        first = next(shown, None)
        if first is not None and first.time <= time:
            yield first
            yield from shown
            return
    with open_container(path, cache) as fresh:
        yield from _decode(path, fresh, video_stream(fresh, path), after_seek=False)


def _decode(
    path: str, container: InputContainer, stream: VideoStream, *, after_seek: bool
) -> Iterator[_Shown]:
    """Decode on from where the container stands.

    After a seek, frames before the keyframe are left out: they need frames that were not read (open
    GOP). Frames after damage are DecodeError: they may be made of what was lost.
    """
    tick, start = _tick(stream), stream.start_time or 0
    rate = stream.average_rate or stream.guessed_rate
    usual = float(1 / rate) if rate else 0.04
    first = hurt = last = None
    end = 0.0
    for packet in container.demux(stream):
        if packet.is_corrupt:
            hurt = packet.pts if hurt is None else hurt
            continue
        if first is None and packet.is_keyframe:
            first = packet.pts
        for frame in packet.decode():
            if after_seek and _before(frame, first):
                continue
            pts = frame.dts if frame.pts is None else frame.pts
            if pts is None or (last is not None and pts <= last):
                # AVI keeps no times and those guessed for B-frames go back; frames come in order.
                pts = start + round(end / tick)
            if frame.is_corrupt:
                hurt = pts if hurt is None else hurt
                continue
            if last is not None and hurt is not None and pts > hurt:
                raise DecodeError(path, f"is damaged at {(hurt - start) * tick:.2f} s")
            last = pts
            end = (pts - start) * tick + (frame.duration * tick if frame.duration else usual)
            yield _Shown(seconds_of(pts, start, tick), end, frame)


def _before(frame: VideoFrame, first: int | None) -> bool:
    return first is None or (frame.pts is not None and frame.pts < first)


def _tick(stream: VideoStream) -> float:
    """Seconds in one unit of the stream's timestamps."""
    assert stream.time_base is not None
    return float(stream.time_base)


class _Picture:
    """Frames to arrays of the first one's size and turn; one picked again is converted once."""

    def __init__(self, path: str, transform: FrameTransform | None) -> None:
        self._path = path
        self._transform = transform
        self._reformatter = VideoReformatter()
        self._size: tuple[int, int] | None = None
        self._turn = Turn()
        self._latest: tuple[VideoFrame, NDArray[Any]] | None = None

    def of(self, frame: VideoFrame) -> NDArray[Any]:
        if self._latest is None or self._latest[0] is not frame:
            if self._size is None:
                check_size(self._path, frame.height, frame.width)
                self._size = (frame.height, frame.width)
                self._turn = turn_of(frame)
            height, width = self._size
            rgb = self._reformatter.reformat(
                frame, width=width, height=height, format="rgb24", threads=1
            )
            picture = upright(np.asarray(rgb.to_ndarray()), self._turn)
            array = picture if self._transform is None else self._transform(picture)
            self._latest = (frame, array)
        return self._latest[1]
