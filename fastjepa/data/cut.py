"""The compressed pictures a clip needs, cut out of a video as a small file in memory: no decoding.

A decoder of another kind (DALI) then gets a file of known pictures, numbered from 0 without a gap,
a fixed time apart, and is told which to show. Which those are is settled here by timestamp, as
decode_pyav does it. So a long video costs no more than a short one, and the file may lie anywhere
that PyAV can read. What is odd about a file (its end is missing, it has no times, its pictures are
of several sizes) is left to FFmpeg.
"""

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from fastjepa.data.bitstream import Shape, read_packet
from fastjepa.data.cache import DEFAULT, Cache
from fastjepa.data.clip_plan import Box
from fastjepa.data.decode_pyav import header_length, open_container, video_stream
from fastjepa.data.decoder import check_size
from fastjepa.data.frame_times import clip_times, seconds_of, shown_at
from fastjepa.data.turn import Turn, turn_of
from fastjepa.data.wanted_frames import Packet, read_ahead

_REORDERED = ("h264", "hevc")  # codecs whose pictures are not sent in the order they are shown
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
    """Cut the clip that `decode_clip` would read; None for one that is left to that.

    `box(height, width)` chooses the crop of the upright picture. Raises DecodeError for a file that
    cannot be opened.
    """
    try:
        with open_container(path, cache) as container:
            stream = video_stream(container, path)
            length = header_length(container, stream)
            if length is None or _codec(stream) not in operators.codecs:
                return None
            times = clip_times(length, start_fraction, frames, fps)
            packets = read_ahead(container, stream, times, min(times[-1], length) - 1.0 / fps)
            if packets is None:
                return None
            pictures = _pictures(packets, stream, container)
            wanted = _wanted(pictures, stream, times)
            return _cut(path, stream, pictures, wanted, operators, box, flip)
    except (_UnfitError, av.FFmpegError):
        return None


class _UnfitError(Exception):
    """Only FFmpeg can be trusted to tell this file's pictures apart."""


class _Picture(NamedTuple):
    """A packet and the one picture in it."""

    packet: Packet
    pts: int
    starts: bool


def _codec(stream: VideoStream) -> str:
    name: str = stream.codec_context.codec.canonical_name
    return name


def _pictures(
    packets: Iterable[Packet], stream: VideoStream, container: InputContainer
) -> list[_Picture]:
    """Packets that are one picture each, all of one size; those that need earlier ones left out."""
    codec = _codec(stream)
    in_turn = codec not in _REORDERED
    if not in_turn and container.format.name == "avi":
        raise _UnfitError  # it keeps no times, and those guessed are wrong
    shapes: frozenset[Shape] = frozenset()
    pictures: list[_Picture] = []
    for packet in packets:
        assert packet.pts is not None
        coded = read_packet(codec, bytes(packet), packet.is_keyframe)
        picture = _Picture(packet, packet.pts, coded.starts)
        shapes |= coded.shapes
        if coded.shown != 1 or len(shapes) > 1 or packet.has_sidedata("new_extradata"):
            raise _UnfitError
        if not pictures and not picture.starts:
            raise _UnfitError
        if not pictures or picture.pts >= pictures[0].pts:
            pictures.append(picture)
        elif codec != "hevc":
            raise _UnfitError
    times = [picture.pts for picture in pictures]
    if len(set(times)) < len(times) or (in_turn and times != sorted(times)):
        raise _UnfitError
    return pictures


def _wanted(pictures: list[_Picture], stream: VideoStream, times: list[float]) -> list[int]:
    """Timestamp of the picture on screen at each of `times`."""
    tick, start = float(stream.time_base or 0), stream.start_time or 0
    shown = sorted(picture.pts for picture in pictures if not picture.packet.is_discard)
    if not shown:
        raise _UnfitError
    return [shown[i] for i in shown_at(times, [seconds_of(pts, start, tick) for pts in shown])]


def _cut(
    path: str,
    stream: VideoStream,
    pictures: list[_Picture],
    wanted: list[int],
    operators: Operators,
    box: Callable[[int, int], Box],
    flip: bool,
) -> tuple[bytearray, Cut]:
    sent = [picture.pts for picture in pictures]
    end = 1 + max(sent.index(pts) for pts in wanted)
    pictures, asked = _settle_leading(pictures[:end], set(wanted))
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
        places=tuple(asked.index(pts) for pts in wanted),
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


def _decode_first(stream: VideoStream, packet: Packet) -> VideoFrame:
    """The keyframe decoded: the size, turn and colours that a container only claims."""
    frames = [*packet.decode(), *stream.codec_context.decode(None)]
    if not frames or frames[0].is_corrupt or frames[0].interlaced_frame:
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
