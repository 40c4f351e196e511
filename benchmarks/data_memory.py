"""Does memory stay flat? Many clips through the loader, and the memory of its processes by time.

    python benchmarks/data_memory.py --clips 10000 --workers 2 --json out.json

Videos of several codecs and sizes are written on the spot. The slope is that of a straight line
through the readings after the first tenth of the clips, its error by the scatter around it.
"""

import argparse
import json
import math
import os
import tempfile
from pathlib import Path

import numpy as np
import torch

from fastjepa.bench.machine import commit, device_facts, versions
from fastjepa.data.encode import encodable
from fastjepa.data.loader import Loader
from fastjepa.data.manifest import read_manifest
from fastjepa.data.numbered import write_numbered
from fastjepa.observe.processes import children, own_bytes

BATCH, READINGS = 4, 200


def readings(clips: int, workers: int, folder: Path) -> list[tuple[int, int, int]]:
    """(clips so far, bytes of the workers, bytes of this process)."""
    for number, codec in enumerate(encodable() * 2):
        height, width = ((96, 128), (240, 320))[number % 2]
        write_numbered(folder, number, codec=codec, frames=120, height=height, width=width)
    loader = Loader(
        datasets=[(read_manifest(str(folder)), 1.0)],
        batch=BATCH, frames=16, fps=4.0, crop=64, scale=(0.3, 1.0), aspect=(0.75, 1.35), flip=0.5,
        seed=0, workers=workers,
    )  # fmt: skip
    steps = clips // BATCH
    found = []
    for batch in loader.batches(0, steps):
        if batch.bad:
            raise SystemExit(f"bad files: {batch.bad}")
        if (batch.step + 1) % max(1, steps // READINGS) == 0:
            found.append(
                ((batch.step + 1) * BATCH, own_bytes(children()), own_bytes([os.getpid()]))
            )
    return found


def slope(points: list[tuple[int, int]]) -> tuple[float, float]:
    """Bytes a clip and the standard error, by least squares."""
    x, y = np.array(points, float).T
    x -= x.mean()
    gradient = float((x * y).sum() / (x * x).sum())
    scatter = y - y.mean() - gradient * x
    error = math.sqrt(float((scatter**2).sum()) / (len(x) - 2) / float((x * x).sum()))
    return gradient, error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clips", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = readings(chosen.clips, chosen.workers, Path(folder))
    later = [reading for reading in found if reading[0] > chosen.clips / 10]
    results: dict[str, object] = {
        "command": f"python benchmarks/data_memory.py --clips {chosen.clips} "
        f"--workers {chosen.workers}",
        "commit": commit(),
        "device": device_facts(torch.device("cpu")),
        "versions": versions("torch", "av", "fastjepa"),
        "readings": [dict(zip(("clips", "workers", "trainer"), row, strict=True)) for row in found],
    }
    for column, name in ((1, "workers"), (2, "trainer")):
        gradient, error = slope([(row[0], row[column]) for row in later])
        results[f"{name}_kib_per_1000_clips"] = gradient * 1000 / 1024
        results[f"{name}_standard_error"] = error * 1000 / 1024
        print(
            f"{name}: {later[-1][column] / 1e6:.0f} MB, {gradient * 1000 / 1024:+.1f} "
            f"+- {error * 1000 / 1024:.1f} KiB per 1,000 clips"
        )
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
