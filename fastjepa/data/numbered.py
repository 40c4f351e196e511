"""Videos whose every frame says which it is: 64 black and white cells hold the number of the video,
the number of the frame and a checksum of both.

    video = write_numbered(folder, 7, codec="vp9")
    read_number(decode_clip(str(video.path), 0.5, 1, 4.0)[0])   # (7, 23)

The cells survive lossy codecs, subsampled colour, other brightness and resizing to 64 pixels or
more. A picture that is turned, mirrored, cut, blended or empty has no number.
"""

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastjepa.data.decoder import Frame
from fastjepa.data.encode import CODECS, write_video

_SIDE = 8  # cells a row and rows: 64 bits
_DARK, _LIGHT = 32, 224


def picture(video: int, frame: int, height: int, width: int) -> Frame:
    """Draw a number: uint8 [H, W, 3]. Raises ValueError for a number that does not fit 16 bits."""
    if not (0 <= video < 2**16 and 0 <= frame < 2**16):
        raise ValueError(f"video is {video} and frame {frame}, expected 0 to 65535")
    number = struct.pack(">HH", video, frame)
    code = np.frombuffer(number + _checksum(number), np.uint8)
    cells = np.where(np.unpackbits(code).reshape(_SIDE, _SIDE), _LIGHT, _DARK).astype(np.uint8)
    grey = cells[_cells(height)][:, _cells(width)]
    return np.repeat(grey[..., None], 3, axis=2)


def read_number(picture: NDArray[Any]) -> tuple[int, int] | None:
    """Read (video, frame) from a picture [H, W, 3] of any dtype, or None where there is none.

    Green alone is read, so a brightness and contrast of each colour's own (normalisation) is
    harmless.
    """
    green = np.asarray(picture[..., 1], np.float64)
    # The middle half of each cell: its edges are blurred by codecs and resizing.
    rows, columns = (_middles(length) for length in green.shape)
    means = np.array([[green[row, column].mean() for column in columns] for row in rows])
    bits = means > (means.min() + means.max()) / 2
    code = np.packbits(bits.reshape(-1)).tobytes()
    if _checksum(code[:4]) != code[4:]:
        return None
    video, frame = struct.unpack(">HH", code[:4])
    return video, frame


@dataclass(frozen=True)
class NumberedVideo:
    """A file of numbered pictures: frame k is shown from k / `fps` seconds on."""

    path: Path
    number: int
    frames: int
    fps: float
    codec: str
    height: int
    width: int


def write_numbered(
    folder: Path,
    number: int,
    *,
    codec: str = "h264",
    frames: int = 48,
    fps: float = 24.0,
    height: int = 96,
    width: int = 128,
) -> NumberedVideo:
    """Encode video `number` as `folder`/NUMBER.ending. Raises ValueError as `write_video` does."""
    suffix = CODECS[codec].suffix if codec in CODECS else ""
    path = write_video(
        folder / f"{number}{suffix}",
        (picture(number, frame, height, width) for frame in range(frames)),
        codec,
        fps=fps,
    )
    return NumberedVideo(path, number, frames, fps, codec, height, width)


def _checksum(number: bytes) -> bytes:
    # From 1, not 0: else all bits set would have the checksum of all bits set, a blank picture.
    return zlib.crc32(number, 1).to_bytes(4, "big")


def _cells(length: int) -> NDArray[np.intp]:
    """The cell of every pixel along a side."""
    return np.arange(length) * _SIDE // length


def _middles(length: int) -> list[slice]:
    size = length / _SIDE
    return [slice(round((i + 0.25) * size), round((i + 0.75) * size)) for i in range(_SIDE)]
