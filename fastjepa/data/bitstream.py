"""What a compressed picture says of itself in its first bytes, read without decoding it.

Decoders outside FFmpeg count packets and believe the container. These facts tell the files apart in
which a packet is not one picture, or the size changes on the way.
"""

from collections.abc import Callable
from typing import NamedTuple

Shape = bytes | tuple[int, int]

_START_CODE = b"\x00\x00\x01"


class Coded(NamedTuple):
    """One packet: whether a decoder may start here, how many pictures it shows, and their shapes.

    A shape is whatever the codec says of the size (bytes of a header, width and height less one):
    where a stream's packets have two, its pictures are of two sizes. A packet need not say.
    """

    starts: bool
    shown: int
    shapes: frozenset[Shape] = frozenset()


def read_packet(codec: str, data: bytes, keyframe: bool) -> Coded:
    """Look into a packet of `codec`, a key of `CODECS`; `keyframe` is what the container says."""
    return CODECS[codec](data, keyframe)


def _vp8(data: bytes, keyframe: bool) -> Coded:
    key, shown = not data[0] & 1, data[0] >> 4 & 1
    if not key or data[3:6] != b"\x9d\x01\x2a":
        return Coded(False, shown)
    width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (6, 8))
    return Coded(keyframe, shown, frozenset({(width, height)}))


def _vp9(data: bytes, keyframe: bool) -> Coded:
    """A packet may hold hidden pictures before the one it shows (a superframe)."""
    frames = [_vp9_frame(_Bits(frame)) for frame in _vp9_frames(data)]
    return Coded(
        keyframe and bool(frames) and frames[0].starts,
        sum(frame.shown for frame in frames),
        frozenset[Shape]().union(*(frame.shapes for frame in frames)),
    )


def _vp9_frames(data: bytes) -> list[bytes]:
    mark = data[-1]
    count, width = (mark & 7) + 1, (mark >> 3 & 3) + 1
    index = data[-(2 + count * width) :]
    if mark & 0xE0 != 0xC0 or index[0] != mark:
        return [data]
    frames, start = [], 0
    for number in range(count):
        size = int.from_bytes(index[1 + number * width : 1 + (number + 1) * width], "little")
        frames.append(data[start : start + size])
        start += size
    return [frame for frame in frames if frame]


def _vp9_frame(bits: "_Bits") -> Coded:
    """The uncompressed header as far as the size (VP9 bitstream specification, section 6.2)."""
    bits.take(2)
    profile = bits.take(1) + 2 * bits.take(1)
    if profile == 3:
        bits.take(1)
    if bits.take(1):
        return Coded(False, 1)
    key, shown, resilient = not bits.take(1), bits.take(1), bits.take(1)
    if key:
        bits.take(24)
        _skip_vp9_colours(bits, profile)
        return Coded(True, shown, _vp9_size(bits))
    intra_only = 0 if shown else bits.take(1)
    if not resilient:
        bits.take(2)
    if intra_only:
        bits.take(24)
        if profile:
            _skip_vp9_colours(bits, profile)
        bits.take(8)
        return Coded(False, shown, _vp9_size(bits))
    bits.take(8 + 3 * 4)
    if any(bits.take(1) for _ in range(3)):
        return Coded(False, shown)
    return Coded(False, shown, _vp9_size(bits))


def _vp9_size(bits: "_Bits") -> frozenset[Shape]:
    return frozenset({(bits.take(16), bits.take(16))})


def _skip_vp9_colours(bits: "_Bits", profile: int) -> None:
    rgb = 7
    if profile >= 2:
        bits.take(1)
    if bits.take(3) != rgb:
        bits.take(1)
        if profile & 1:
            bits.take(3)
    elif profile & 1:
        bits.take(1)


def _mjpeg(data: bytes, keyframe: bool) -> Coded:
    """Walk the JPEG's segments to the frame header; after it there may be a second field."""
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = (int.from_bytes(data[at + k : at + k + 2], "big") for k in (5, 7))
            return Coded(True, 1, frozenset({(width, height)}))
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return Coded(keyframe, 1)


def _h264(data: bytes, keyframe: bool) -> Coded:
    """Every decoder can start at an IDR picture (type 5), few at others; 7 is the size header."""
    units = [(unit[0] & 0x1F, unit) for unit in _nal_units(data)]
    headers = frozenset(unit for kind, unit in units if kind == 7)
    return Coded(keyframe and any(kind == 5 for kind, _ in units), 1, headers)


def _hevc(data: bytes, keyframe: bool) -> Coded:
    """Types 16 to 21 are pictures to start at; 33 is the header with the size."""
    units = [(unit[0] >> 1 & 0x3F, unit) for unit in _nal_units(data)]
    headers = frozenset(unit for kind, unit in units if kind == 33)
    return Coded(keyframe and any(16 <= kind <= 21 for kind, _ in units), 1, headers)


def _nal_units(data: bytes) -> list[bytes]:
    """Units after lengths of four bytes (MP4, Matroska), or after start codes (streams)."""
    units, at = [], 0
    while at + 4 < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        units.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    if at == len(data) and all(units):
        return units
    stripped = (unit.rstrip(b"\x00") for unit in data.split(_START_CODE)[1:])
    return [unit for unit in stripped if unit]


class _Bits:
    """Bits of a header from the first on; zeros after its end."""

    def __init__(self, data: bytes) -> None:
        self._bits = int.from_bytes(data[:32].ljust(32, b"\x00"), "big")
        self._left = 256

    def take(self, count: int) -> int:
        self._left -= count
        return self._bits >> self._left & ((1 << count) - 1)


CODECS: dict[str, Callable[[bytes, bool], Coded]] = {
    "vp8": _vp8,
    "vp9": _vp9,
    "mjpeg": _mjpeg,
    "h264": _h264,
    "hevc": _hevc,
}
