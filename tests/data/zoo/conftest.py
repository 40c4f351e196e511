"""The zoo: small files that FFmpeg's command makes when a test first asks for them."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from fastjepa.data.encode import write_video
from fastjepa.data.numbered import picture

from .recipes import GOOD, PARTS, PLANES, TURNED


@dataclass(frozen=True)
class Shown:
    """What FFmpeg's command makes of a file: uint8 [N, H, W, 3], and when each frame is shown, in
    seconds from the first."""

    frames: np.ndarray
    times: np.ndarray
    length: float


def _ffmpeg(*words: str) -> bytes:
    """Run FFmpeg and return what it wrote to its output."""
    command = ["ffmpeg", "-v", "error", "-nostdin", "-y", *words]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "SVT_LOG": "1"})
    errors = done.stderr.decode(errors="replace")
    if "Unknown encoder" in errors:
        pytest.skip(f"this FFmpeg lacks an encoder: {errors.strip()}")
    assert done.returncode == 0, errors
    return done.stdout


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Path of a file of the zoo by its name."""
    if shutil.which("ffmpeg") is None:
        pytest.skip("the command ffmpeg is not installed")
    folder = tmp_path_factory.mktemp("zoo")
    recipes = {**PARTS, **GOOD}

    def make(name: str) -> Path:
        path = folder / name
        if path.exists():
            return path
        if name in TURNED:
            pictures = (picture(0, number, 64, 96) for number in range(24))
            return write_video(path, pictures, "h264", rotation=TURNED[name])
        words = shlex.split(recipes[name].replace("\\", "\\\\"))
        _ffmpeg(*(str(make(word[1:])) if word[0] == "@" else word for word in words), str(path))
        return path

    return make


def ffmpeg_output(path: Path) -> Shown:
    """Decode a file by FFmpeg's command: upright, every frame once."""
    kept = PLANES.get(path.name)
    # Frames to its output, and times, in the file's own ticks, to a list beside the file.
    every = ("-map", "0:V:0", "-vsync", "passthrough", "-enc_time_base", "-1")
    times_file = path.with_name(f"{path.name}.times")
    raw = _ffmpeg(
        *("-i", str(path)),
        *(*every, "-pix_fmt", kept or "rgb24", "-f", "rawvideo", "pipe:1"),
        *(*every, "-f", "framecrc", str(times_file)),
    )  # fmt: skip
    lines = times_file.read_text().splitlines()
    header = dict(line[1:].split(": ") for line in lines if line.startswith("#"))
    width, height = map(int, header["dimensions 0"].split("x"))
    rows = [[int(cell) for cell in line.split(",")[1:4]] for line in lines if line[0] != "#"]
    ticks = np.array([dts for dts, _, _ in rows])
    seconds = (ticks - ticks[0]) * float(Fraction(header["tb 0"]))
    if kept is None:
        frames = np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)
    else:
        frames = _same_planes(path, raw)
    assert len(frames) == len(rows)
    usual = float(np.median(np.diff(seconds))) if len(rows) > 1 else 1 / 24
    return Shown(frames, seconds, float(seconds[-1]) + usual)


def _same_planes(path: Path, raw: bytes) -> np.ndarray:
    """Frames read in turn by PyAV, whose planes must be those of FFmpeg's command, in colours."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    assert b"".join(frame.to_ndarray().tobytes() for frame in frames) == raw
    return np.stack([frame.to_ndarray(format="rgb24") for frame in frames])


@pytest.fixture(scope="session")
def output_of(zoo: Callable[[str], Path]) -> Callable[[str], Shown]:
    """What FFmpeg makes of a file of the zoo, worked out once."""
    known: dict[str, Shown] = {}

    def look(name: str) -> Shown:
        if name not in known:
            known[name] = ffmpeg_output(zoo(name))
        return known[name]

    return look
