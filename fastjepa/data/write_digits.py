"""Moving digits as real video files, with labels beside them and a manifest.

    for path in write_digits(Path("digits"), MovingDigits(), 100, codec="h264", workers=4): ...
    labels = np.load("digits/000041.npz")     # mask, instance, digits, images, positions, ...

A file's bytes depend on the source, the codec and its number alone, not on the workers.
"""

import csv
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from fastjepa.data.encode import CODECS, check_codec, write_video
from fastjepa.data.moving_digits import MovingDigits
from fastjepa.durable import whole_file

MANIFEST = "manifest.csv"


def write_digits(
    folder: Path, source: MovingDigits, count: int, *, codec: str = "h264", workers: int = 1
) -> Iterator[Path]:
    """Write the clips 0 to `count` - 1 as NUMBER.mp4 (or the codec's ending) and NUMBER.npz.

    Yields each video once it is there, in order; `manifest.csv`, which lists them, comes last, so
    that a folder without it is not whole and is written again. The labels are the fields of
    `DigitsClip` but the frames, and `fps`. Raises ValueError for a codec that cannot be encoded and
    for a folder that is whole already.
    """
    check_codec(codec)
    source[0]  # a missing library is told before any process is started
    if count < 1:
        raise ValueError(f"count is {count}, expected at least 1")
    if (folder / MANIFEST).exists():
        raise ValueError(f"{folder}: holds a {MANIFEST} already; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    return _write_all(folder, source, count, codec, workers)


def _write_all(
    folder: Path, source: MovingDigits, count: int, codec: str, workers: int
) -> Iterator[Path]:
    write_one = partial(_write_one, folder, source, codec)
    names = []
    with ExitStack() as stack:
        written: Iterator[Path] = map(write_one, range(count))
        if workers > 1:
            # Spawned, not forked: torch and the caller may run threads.
            spawn = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=spawn))
            chunk = max(1, min(16, count // workers))
            written = pool.map(write_one, range(count), chunksize=chunk)
        for path in written:
            names.append(path.name)
            yield path
    with whole_file(folder / MANIFEST) as temporary, temporary.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["path"], *([name] for name in names)])


def _write_one(folder: Path, source: MovingDigits, codec: str, number: int) -> Path:
    clip = source[number]
    labels = {name: value for name, value in asdict(clip).items() if name != "frames"}
    path = folder / f"{number:06d}{CODECS[codec].suffix}"
    with whole_file(path.with_suffix(".npz")) as temporary:
        np.savez_compressed(temporary, fps=source.fps, **labels)
    return write_video(path, clip.frames, codec, fps=source.fps)
