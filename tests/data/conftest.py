"""Real media made on the spot; every video frame shows its own number as eight stripes."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest


def _numbered(number: int, height: int, width: int) -> np.ndarray:
    bits = [255 * (number >> bit & 1) for bit in range(8)]
    row = np.array([bits[min(7, x * 8 // width)] for x in range(width)], np.uint8)
    return np.broadcast_to(row[None, :, None], (height, width, 3)).copy()


def _write_video(
    path: Path,
    codec: str = "libx264",
    *,
    pts: Sequence[int] = tuple(range(48)),
    tick: Fraction = Fraction(1, 24),
    height: int = 48,
    width: int = 64,
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    rotation: float | None = None,
    picture: Callable[[int, int, int], np.ndarray] = _numbered,
) -> Path:
    """Write one frame per timestamp (in ticks); frame k shows the number k."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=24, options=options or {})
        stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
        stream.time_base = stream.codec_context.time_base = tick
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for number, time in enumerate(pts):
            frame = av.VideoFrame.from_ndarray(picture(number, height, width), format="rgb24")
            frame.pts, frame.time_base = time, tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _read_numbers(clip: np.ndarray) -> list[int]:
    """Frame numbers of a clip uint8 [T, H, W, 3]."""
    height, width = clip.shape[1:3]
    columns = [(2 * bit + 1) * width // 16 for bit in range(8)]
    bits = clip[:, height // 2, columns, 1] > 127
    return [int(sum(1 << bit for bit in range(8) if row[bit])) for row in bits]


@pytest.fixture(scope="session")
def write_video() -> Callable[..., Path]:
    return _write_video


@pytest.fixture(scope="session")
def read_numbers() -> Callable[[np.ndarray], list[int]]:
    return _read_numbers


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of five short videos, told apart by the number of their first frame's stripes."""
    folder = tmp_path_factory.mktemp("clips")
    for i in range(5):
        _write_video(
            folder / f"clip{i}.mp4",
            options={"g": "12"},
            picture=lambda number, height, width, i=i: _numbered(
                (number + 40 * i) % 256, height, width
            ),
        )
    return folder
