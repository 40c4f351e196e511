"""The compressed pictures a clip needs, cut out of a video as a small file in memory: no decoding.

A decoder of another kind (DALI) then gets a file of known pictures, numbered from 0 without a gap,
a fixed time apart, and is told which to show. Which those are is settled here by timestamp, as
decode_pyav does it. So a long video costs no more than a short one, a truncated one cannot give
empty pictures, and the file may lie anywhere that PyAV can read.
"""

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, dropwhile
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from fastjepa.data.bitstream import Shape, read_packet
from fastjepa.data.cache import DEFAULT, Cache
from fastjepa.data.clip_plan import Box
from fastjepa.data.decode_pyav import (
    SEEK_MARGINS,
    header_length,
    measured_length,
    open_container,
    video_stream,
)
from fastjepa.data.decoder import DecodeError, check_size
from fastjepa.data.frame_times import clip_times, seconds_of, shown_at
from fastjepa.data.turn import Turn, turn_of

# A picture is shown at most so many pictures after it was sent (H.264 and HEVC: 16 are held back).
_MAX_REORDERED = 16
_TICK = Fraction(1, 1000)
_TICKS_PER_FRAME = 40


@dataclass(frozen=True)
class Operators:
    """What a decoder can be trusted with: codecs by FFmpeg's name, pixel formats (None: any)."""

    codecs: frozenset[str]
    formats: frozenset[str] | None = None


class Cut(NamedTuple):
    """What to make of a small Matroska file that holds a clip.

    `numbers` are the pictures to decode, in rising order; `places` says for each frame of the clip
    which of them it is. `corners` (top, left, bottom, right) in decoded pixels is the crop, upside
    down or mirrored where the first lies after the second; after that rows and columns change
    places if `transposed`. `colours` is the 3 x 3 matrix, row by row, from RGB by BT.601, which
    such decoders always assume, to RGB by the file's own standard.
    """

    numbers: tuple[int, ...]
    places: tuple[int, ...]
    corners: tuple[int, int, int, int]
    transposed: bool
    colours: tuple[float, ...]


def cut_clip(
    path: str,
    *,
    start_fraction: float,
    frames: int,
    fps: float,
    box: Callable[[int, int], Box],
    flip: bool,
    operators: Operators,
    cache: Cache = DEFAULT,
) -> tuple[bytearray, Cut] | None:
    """Cut the clip that `decode_clip` would read; None for a file that the operators cannot have.

    `box(height, width)` chooses the crop of the upright picture. Raises DecodeError for a file
    without such a clip.
    """

    def cut_from(container: InputContainer, length: float) -> tuple[bytearray, Cut] | None:
        stream = video_stream(container, path)
        times = clip_times(length, start_fraction, frames, fps)
        taken = _take(container, stream, times, until=min(times[-1], length) - 1.0 / fps)
        return None if taken is None else _cut(path, stream, taken, operators, box, flip)

    try:
        with open_container(path, cache) as container:
            stream = video_stream(container, path)
            if stream.codec_context.codec.canonical_name not in operators.codecs:
                return None
            length = header_length(container, stream)
            found = None if length is None else cut_from(container, length)
        if found is None:
            length = measured_length(path, cache)
            with open_container(path, cache) as container:
                found = cut_from(container, length)
    except _UnfitError:
        return None
    except av.FFmpegError as error:
        raise DecodeError(path, f"cannot be decoded ({error.strerror})") from None
    if found is None:
        raise DecodeError(path, f"frames are missing within its {length:.2f} s")
    return found


class _UnfitError(Exception):
    """Only FFmpeg can be trusted to tell this file's pictures apart."""


class _Picture(NamedTuple):
    """A packet and the one picture in it."""

    packet: "Packet[VideoStream]"
    pts: int
    starts: bool


class _Taken(NamedTuple):
    """Packets in the order of decoding, and the timestamp of each of the clip's frames."""

    pictures: list[_Picture]
    wanted: list[int]


def _take(
    container: InputContainer, stream: VideoStream, times: list[float], until: float
) -> _Taken | None:
    """The pictures on screen at `times`, or None for a file whose pictures end before `until`."""
    assert stream.time_base is not None
    tick, origin = float(stream.time_base), stream.start_time or 0
    pictures: list[_Picture] = []
    beyond, ended = 0, True
    for picture in _pictures(_packets_from(container, stream, times[0]), stream):
        pictures.append(picture)
        beyond += seconds_of(picture.pts, origin, tick) > times[-1]
        if beyond > _MAX_REORDERED:
            ended = False
            break
    shown = sorted(
        (p for p in pictures if not p.packet.is_discard), key=lambda picture: picture.pts
    )
    if not shown:
        return None
    if len({picture.pts for picture in shown}) < len(shown):
        raise _UnfitError
    end = (shown[-1].pts - origin) * tick + _duration(shown[-1].packet, stream)
    if ended and end < until:
        return None
    seconds = [seconds_of(picture.pts, origin, tick) for picture in shown]
    return _Taken(pictures, [shown[i].pts for i in shown_at(times, seconds)])


def _packets_from(
    container: InputContainer, stream: VideoStream, time: float
) -> "Iterator[Packet[VideoStream]]":
    """Packets from a keyframe at `time` or before."""
    if time <= 0.0 or stream.start_time is None:
        return _from_keyframe(container.demux(stream))
    assert stream.time_base is not None
    tick = float(stream.time_base)
    for margin in SEEK_MARGINS:
        container.seek(stream.start_time + int(max(0.0, time - margin) / tick), stream=stream)
        packets = _from_keyframe(container.demux(stream))
        first = next(packets, None)
        if first is None or first.pts is None:
            continue
        if seconds_of(first.pts, stream.start_time, tick) <= time:
            return chain([first], packets)
    raise _UnfitError


def _from_keyframe(packets: "Iterable[Packet[VideoStream]]") -> "Iterator[Packet[VideoStream]]":
    return dropwhile(lambda packet: not (packet.size and packet.is_keyframe), packets)


def _pictures(packets: "Iterable[Packet[VideoStream]]", stream: VideoStream) -> Iterator[_Picture]:
    """Packets that are one picture each, all of one size; those that need earlier ones left out."""
    codec = stream.codec_context.codec.canonical_name
    shapes: frozenset[Shape] = frozenset()
    first: _Picture | None = None
    for packet in packets:
        if not packet.size:
            continue
        if packet.is_corrupt or packet.pts is None or packet.has_sidedata("new_extradata"):
            raise _UnfitError
        coded = read_packet(codec, bytes(packet), packet.is_keyframe)
        shapes |= coded.shapes
        picture = _Picture(packet, packet.pts, coded.starts)
        first = first or picture
        if coded.shown != 1 or len(shapes) > 1 or not first.starts:
            raise _UnfitError
        if picture.pts >= first.pts:
            yield picture


def _duration(packet: "Packet[VideoStream]", stream: VideoStream) -> float:
    """Seconds that a picture is shown for."""
    assert stream.time_base is not None
    if packet.duration:
        return float(packet.duration * stream.time_base)
    rate = stream.average_rate or stream.guessed_rate
    return float(1 / rate) if rate else 0.04


def _cut(
    path: str,
    stream: VideoStream,
    taken: _Taken,
    operators: Operators,
    box: Callable[[int, int], Box],
    flip: bool,
) -> tuple[bytearray, Cut]:
    sent = [picture.pts for picture in taken.pictures]
    end = 1 + max(sent.index(pts) for pts in taken.wanted)
    pictures, asked = _settle_leading(taken.pictures[:end], set(taken.wanted))
    number = {pts: i for i, pts in enumerate(sorted(picture.pts for picture in pictures))}
    first = _decode_first(stream, pictures[0].packet)
    height, width = first.height, first.width
    check_size(path, height, width)
    even = height % 2 == 0 and width % 2 == 0
    if operators.formats is not None and not (even and first.format.name in operators.formats):
        raise _UnfitError
    turn = turn_of(first)
    upright = (width, height) if turn.transposed else (height, width)
    cut = Cut(
        numbers=tuple(number[pts] for pts in asked),
        places=tuple(asked.index(pts) for pts in taken.wanted),
        corners=_corners(box(*upright), upright, turn, flip),
        transposed=turn.transposed,
        colours=matrix_from_601(first.colorspace),
    )
    return _mux(stream, pictures, number), cut


def _settle_leading(pictures: list[_Picture], wanted: set[int]) -> tuple[list[_Picture], list[int]]:
    """Leave out pictures sent after a keyframe but shown before it, where none of them is wanted.

    DALI may jump to that keyframe, and they cannot be decoded from there (open GOP). Where one is
    wanted, all are asked for, and the keyframe too: then it has no reason to jump.
    """
    groups: list[list[_Picture]] = []
    for picture in pictures:
        if picture.starts:
            groups.append([])
        groups[-1].append(picture)
    kept: list[_Picture] = []
    asked = set(wanted)
    for group in groups:
        keyframe = group[0].pts
        leading = {picture.pts for picture in group if picture.pts < keyframe}
        if wanted.isdisjoint(leading):
            kept += [picture for picture in group if picture.pts not in leading]
        else:
            kept += group
            asked |= {keyframe, *leading}
    return kept, sorted(asked)


def _decode_first(stream: VideoStream, packet: "Packet[VideoStream]") -> VideoFrame:
    """The keyframe decoded: the size, turn and colours that a container only claims."""
    frames = [*packet.decode(), *stream.codec_context.decode(None)]
    if not frames or frames[0].is_corrupt:
        raise _UnfitError
    return frames[0]


def _mux(stream: VideoStream, pictures: list[_Picture], number: dict[int, int]) -> bytearray:
    """Packets to a Matroska file, the picture of number k shown at k * _TICKS_PER_FRAME."""
    numbers = [number[picture.pts] for picture in pictures]
    delay = max(sent - shown for sent, shown in enumerate(numbers))
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        target = container.add_stream_from_template(stream)
        for sent, (picture, shown) in enumerate(zip(pictures, numbers, strict=True)):
            packet = picture.packet
            packet.stream = target
            packet.time_base = _TICK
            packet.pts = shown * _TICKS_PER_FRAME
            packet.dts = (sent - delay) * _TICKS_PER_FRAME
            packet.duration = _TICKS_PER_FRAME
            container.mux(packet)
    return bytearray(file.getbuffer())


def _corners(
    box: Box, upright: tuple[int, int], turn: Turn, flip: bool
) -> tuple[int, int, int, int]:
    """A box of the upright picture as corners in the decoded one, the mirroring included."""
    height, width = upright
    top, bottom = box.top, box.top + box.height
    left, right = box.left, box.left + box.width
    if flip:
        left, right = right, left
    if turn.up_down:
        top, bottom = height - top, height - bottom
    if turn.left_right:
        left, right = width - left, width - right
    return (left, top, right, bottom) if turn.transposed else (top, left, bottom, right)


def matrix_from_601(colorspace: int) -> tuple[float, ...]:
    """RGB made by BT.601 to RGB of FFmpeg's `colorspace`, a 3 x 3 matrix row by row."""
    assumed = _to_rgb(0.299, 0.114)
    # By FFmpeg's numbers: BT.709, FCC, SMPTE 240M, BT.2020.
    red_blue = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 7: (0.212, 0.087), 9: (0.2627, 0.0593)}
    own = _to_rgb(*red_blue.get(colorspace, (0.299, 0.114)))
    return tuple((own @ np.linalg.inv(assumed)).ravel().tolist())


def _to_rgb(red: float, blue: float) -> np.ndarray:
    """Float64 [3, 3] from (Y, Cb, Cr) to RGB, by the weights of red and blue in Y."""
    green = 1.0 - red - blue
    return np.array(
        [
            [1.0, 0.0, 2.0 * (1.0 - red)],
            [1.0, -2.0 * blue * (1.0 - blue) / green, -2.0 * red * (1.0 - red) / green],
            [1.0, 2.0 * (1.0 - blue), 0.0],
        ]
    )
