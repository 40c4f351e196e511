"""A clip's frames by decoding as little as possible: packets are read first, and tell which frames
are wanted.

What no wanted frame needs is not decoded: pictures that no other refers to, what follows the last
wanted one in its group of pictures (from a keyframe to the next), and groups without any. The
frames are, bit for bit, those of decoding in order (decode_pyav.py), which takes over wherever
packets and frames do not match one to one.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import dropwhile
from typing import Any, TypeAlias

import av
from av.container import InputContainer
from av.packet import Packet as AnyPacket
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from fastjepa.data.frame_times import seconds_of, shown_at

Packet: TypeAlias = "AnyPacket[VideoStream]"

# Bytes of packets held at once; a file with more between a keyframe and the clip's end is decoded
# in order.
_MOST_HELD = 2**26
# Seconds to go back when the keyframe found lies after the wanted time (open GOPs, coarse indexes).
SEEK_MARGINS = (0.0, 2.0, 10.0)
# Codecs whose unreferenced pictures FFmpeg leaves out on demand, and that learn nothing from them
# for later pictures, as VP9 does.
_LEAVE_OUT = frozenset({"h264", "hevc", "mpeg4", "mpeg2video"})
# Its packets hold invisible pictures with timestamps of their own.
_HIDES = "vp8"


def read_wanted(
    container: InputContainer,
    stream: VideoStream,
    times: Sequence[float],
    reach: float,
    picture: Callable[[VideoFrame], NDArray[Any]],
) -> list[NDArray[Any]] | None:
    """Make `picture` of the frame on screen at each of `times` (seconds, ascending).

    None where this cannot be told from the packets or does not come out as told, and where the
    stream ends before `reach` seconds. Raises FFmpegError as decoding in order does.
    """
    if stream.codec_context.name == _HIDES:
        return None
    packets = read_ahead(container, stream, times, reach)
    if packets is None:
        return None
    tick, start = float(stream.time_base or 0), stream.start_time or 0
    shown = sorted(_pts(p) for p in packets if _pts(p) >= _pts(packets[0]) and not p.is_discard)
    if not shown:
        return None
    seconds = [seconds_of(pts, start, tick) for pts in shown]
    wanted = [shown[index] for index in shown_at(times, seconds)]
    pictures: dict[int, NDArray[Any]] = {}
    last = None
    for frame in _decode(stream.codec_context, _runs(packets, set(wanted)), set(wanted)):
        # Fields may lie in packets of their own, one of them left out; a corrupt frame may be what
        # later ones are made of; and times that go back are guesses.
        if frame.is_corrupt or frame.interlaced_frame or frame.pts is None:
            return None
        if last is not None and frame.pts <= last:
            return None
        last = frame.pts
        if last in wanted:
            pictures[last] = picture(frame)
    return [pictures[pts] for pts in wanted] if len(pictures) == len(set(wanted)) else None


def read_ahead(
    container: InputContainer, stream: VideoStream, times: Sequence[float], reach: float
) -> list[Packet] | None:
    """Packets from a keyframe before the first time until no frame of the clip can follow.

    None where their timestamps do not tell, and where the stream ends before `reach` seconds.
    """
    if stream.time_base is None:
        return None
    tick, start = float(stream.time_base), stream.start_time or 0
    packets: list[Packet] = []
    held = 0
    latest = 0.0
    for packet in _packets_from(container, stream, times[0]):
        if packet.size == 0 and packet.pts is None:
            break  # the end of the stream
        if packet.size == 0 or packet.is_corrupt or packet.pts is None:
            return None
        if packet.dts is not None:
            if packet.dts > packet.pts:
                return None
            if seconds_of(packet.dts, start, tick) > times[-1]:
                return packets
        packets.append(packet)
        held += packet.size
        if held > _MOST_HELD:
            return None
        latest = max(latest, (packet.pts - start + (packet.duration or 0)) * tick)
    return packets if packets and latest >= reach else None


def _packets_from(container: InputContainer, stream: VideoStream, time: float) -> Iterator[Packet]:
    """Packets from a keyframe shown at `time` or before; none where seeking finds no such place."""
    if time <= 0.0:
        yield from dropwhile(lambda packet: not packet.is_keyframe, container.demux(stream))
        return
    if stream.start_time is None or stream.time_base is None:
        return
    tick, start = float(stream.time_base), stream.start_time
    for margin in SEEK_MARGINS:
        try:
            container.seek(start + int(max(0.0, time - margin) / tick), stream=stream)
        except av.FFmpegError:
            return
        found = dropwhile(lambda packet: not packet.is_keyframe, container.demux(stream))
        first = next(found, None)
        if first is None or first.pts is None:
            return
        if seconds_of(first.pts, start, tick) <= time:
            yield first
            yield from found
            return


def _runs(packets: Sequence[Packet], wanted: set[int]) -> list[Sequence[Packet]]:
    """Packets to decode, in runs that each start at a keyframe and need nothing before it."""
    starts = [i for i, packet in enumerate(packets) if packet.is_keyframe]
    runs: list[Sequence[Packet]] = []
    stop, next_needs_this = len(packets), False
    for begin in reversed(starts):
        needed = [i for i in range(begin, stop) if _pts(packets[i]) in wanted]
        if next_needs_this:
            runs[-1] = [*packets[begin:stop], *runs[-1]]
        elif needed:
            runs.append(packets[begin : needed[-1] + 1])
        # In an open group, pictures shown before the keyframe refer to the group before.
        next_needs_this = any(_pts(packets[i]) < _pts(packets[begin]) for i in needed)
        stop = begin
    return runs[::-1]


def _decode(
    decoder: VideoCodecContext, runs: Sequence[Sequence[Packet]], wanted: set[int]
) -> Iterator[VideoFrame]:
    """Frames of the runs, in order of time; some that are not wanted are left out."""
    leave_out = decoder.name in _LEAVE_OUT
    for number, run in enumerate(runs):
        if number:
            decoder.flush_buffers()
        for packet in (*run, None):
            if leave_out:
                unwanted = packet is not None and packet.pts not in wanted
                decoder.skip_frame = "NONREF" if unwanted else "DEFAULT"
            yield from decoder.decode(packet)


def _pts(packet: Packet) -> int:
    assert packet.pts is not None
    return packet.pts
