"""Real videos made on the spot, whose frames show their numbers."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastjepa.data import encode, numbered


def _numbered(number: int, height: int, width: int) -> np.ndarray:
    return numbered.picture(0, number, height, width)


def _write_video(
    path: Path,
    codec: str = "libx264",
    *,
    pts: Sequence[int] = tuple(range(48)),
    tick: Fraction = Fraction(1, 24),
    height: int = 48,
    width: int = 64,
    pix_fmt: str = "yuv420p",
    picture: Callable[[int, int, int], np.ndarray] = _numbered,
    **settings: Any,
) -> Path:
    """Write one frame per timestamp (in ticks); frame k shows the number k."""
    pictures = (picture(number, height, width) for number in range(len(pts)))
    encoding = encode.Encoding(codec, path.suffix, pix_fmt=pix_fmt)
    return encode.write_video(path, pictures, encoding, pts=pts, tick=tick, **settings)


def _read_numbers(clip: np.ndarray) -> list[int]:
    """Frame numbers of a clip uint8 [T, H, W, 3]; -1 where there is none."""
    found = [numbered.read_number(frame) for frame in clip]
    return [-1 if number is None else number[1] for number in found]


@pytest.fixture(scope="session")
def write_video() -> Callable[..., Path]:
    return _write_video


@pytest.fixture(scope="session")
def read_numbers() -> Callable[[np.ndarray], list[int]]:
    return _read_numbers


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of five short numbered videos."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(5):
        numbered.write_numbered(folder, number)
    return folder
