"""Ways in which good files are broken: the name of a good one, and what happens to its bytes."""

from collections.abc import Callable

import numpy as np

Change = Callable[[bytes], bytes]


def _random(data: bytes) -> bytes:
    return np.random.default_rng(0).bytes(20_000)


def _html(data: bytes) -> bytes:
    return b"<!doctype html><html><title>404</title><body>Not found</body></html>" * 50


def _from(share: float) -> Change:
    return lambda data: data[int(share * len(data)) :]


def _to(share: float) -> Change:
    return lambda data: data[: int(share * len(data))]


def _tenth(data: bytes) -> tuple[int, int]:
    """Where the sixth tenth begins and ends."""
    return len(data) // 2, len(data) * 6 // 10


def _ten_packets(data: bytes) -> tuple[int, int]:
    """Ten packets in the middle of a transport stream: it counts them, but only up to sixteen."""
    first = len(data) // 2 // 188 * 188
    return first, first + 10 * 188


def _without(part: Callable[[bytes], tuple[int, int]]) -> Change:
    return lambda data: data[: part(data)[0]] + data[part(data)[1] :]


def _zeroed(part: Callable[[bytes], tuple[int, int]]) -> Change:
    def change(data: bytes) -> bytes:
        first, last = part(data)
        return data[:first] + bytes(last - first) + data[last:]

    return change


def _flipped(data: bytes) -> bytes:
    """Twenty bits between the first and the last fifth."""
    changed = bytearray(data)
    for place in np.random.default_rng(1).integers(len(data) // 5, len(data) * 4 // 5, 20):
        changed[place] ^= 1 << (place % 8)
    return bytes(changed)


def _all_zero_media(data: bytes) -> bytes:
    """An intact index before nothing but zeros."""
    begin = data.index(b"mdat") + 4
    return data[:begin] + bytes(len(data) - begin)


def _other_codec(data: bytes) -> bytes:
    return data.replace(b"avc1", b"zzz1")


def _nothing_shown(data: bytes) -> bytes:
    """The first edit begins where no picture lies, so that every packet is left out of it."""
    begin = data.index(b"elst") + 16
    return data[:begin] + b"\x7f" + data[begin + 1 :]


def _enormous(data: bytes) -> bytes:
    return data.replace(b" W128 H96 ", b" W60000 H60000 ")


# Nothing can be had of these: each is named once and never opened again.
HOPELESS: dict[str, tuple[str, Change]] = {
    "empty.mp4": ("h264.mp4", lambda data: b""),
    "random-bytes.mp4": ("h264.mp4", _random),
    "web-page.mp4": ("h264.mp4", _html),
    "index-missing.mp4": ("h264.mp4", _to(0.6)),
    "beginning-missing.mp4": ("index-first.mp4", _from(0.2)),
    "beginning-missing.webm": ("vp9.webm", _from(0.2)),
    "only-its-header.mp4": ("index-first.mp4", lambda data: data[: data.index(b"mdat") + 4]),
    "unknown-codec.mp4": ("h264.mp4", _other_codec),
    "edit-list-shows-nothing.mp4": ("h264.mp4", _nothing_shown),
    "header-says-enormous.y4m": ("plain.y4m", _enormous),
    "sound-only.mp4": ("sound.m4a", bytes),
    "cover-only.mp4": ("cover-only.mp4", bytes),
}
# Some clips can be had of these.
DAMAGED: dict[str, tuple[str, Change]] = {
    "end-missing.mp4": ("index-first.mp4", _to(0.6)),
    "end-missing.webm": ("vp9.webm", _to(0.6)),
    "end-missing.ts": ("h264.ts", _to(0.6)),
    "beginning-missing.ts": ("h264.ts", _from(0.2)),
    "middle-missing.mp4": ("index-first.mp4", _without(_tenth)),
    "middle-missing.ts": ("h264.ts", _without(_ten_packets)),
    "middle-zeroed.mp4": ("index-first.mp4", _zeroed(_tenth)),
    "middle-zeroed.ts": ("h264.ts", _zeroed(_ten_packets)),
    "all-zeroed.mp4": ("index-first.mp4", _all_zero_media),
}
# No decoder finds every flipped bit: some only change the picture a little.
FLIPPED: dict[str, tuple[str, Change]] = {
    "bits-flipped.mp4": ("index-first.mp4", _flipped),
    "bits-flipped.ts": ("h264.ts", _flipped),
    "bits-flipped.mpg": ("mpeg2.mpg", _flipped),
    "bits-flipped.webm": ("vp9.webm", _flipped),
    "bits-flipped-hevc.mp4": ("hevc.mp4", _flipped),
    "bits-flipped-av1.mp4": ("av1.mp4", _flipped),
}
