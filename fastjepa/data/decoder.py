"""What a decoder is, and the one error it may raise; decode_pyav and decode_image are two."""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastjepa.data.files import Kind

# The largest picture that is decoded: 8192 x 8192, above 8K video (7680 x 4320). Larger headers are
# refused unread.
MAX_PIXELS = 2**26

Frame = NDArray[np.uint8]
FrameTransform = Callable[[Frame], NDArray[Any]]


class DecodeError(ValueError):
    """A file gave no clip. `whole_file` says that no other place in the file would do better."""

    def __init__(self, path: str, reason: str, *, whole_file: bool = False) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason
        self.whole_file = whole_file

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class ClipDecoder(Protocol):
    """Read one clip: `frames` pictures at `fps`, at `start_fraction` of the places it fits.

    Returns uint8 [T, H, W, 3], or what `transform` makes of each picture uint8 [H, W, 3], stacked.
    Raises DecodeError and nothing else for a file that cannot be read.
    """

    def __call__(
        self,
        path: str,
        kind: Kind,
        *,
        start_fraction: float,
        frames: int,
        fps: float,
        transform: FrameTransform | None = None,
    ) -> NDArray[Any]: ...


def check_size(path: str, height: int, width: int) -> None:
    """Raise DecodeError for a picture with no pixels, or with more than MAX_PIXELS."""
    if height <= 0 or width <= 0:
        raise DecodeError(path, f"the picture is {width}x{height} pixels", whole_file=True)
    if height * width > MAX_PIXELS:
        reason = f"{width}x{height} pixels, more than the {MAX_PIXELS} that are decoded"
        raise DecodeError(path, reason, whole_file=True)
