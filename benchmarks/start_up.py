"""How long a manifest of a million files takes to the first clip plan, and how much memory.

    python benchmarks/start_up.py --json out.json

The files do not exist: an index (one row in a hundred unreadable), an official CSV and a CSV with a
header are written, then each is read in fresh interpreters, from their start until the loader asks
its decoder for the first clip. Seconds, seconds of processor (which say more on a busy machine),
peak memory and what one worker process is sent.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fastjepa.data.index import index_schema

PLAN = """
import pickle, resource, sys, time
import numpy as np
from fastjepa.data.loader import Loader
from fastjepa.data.manifest import read_manifest
from fastjepa.data.mixture import Mixture

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

imported = peak()
asked = []

def decoder(path, kind, *, transform, **plan):
    asked.append(path)
    return np.stack([transform(np.zeros((8, 8, 3), np.uint8))] * plan["frames"])

files = read_manifest(sys.argv[1])
loader = Loader(datasets=[(files, 1.0)], batch=1, frames=1, fps=4.0, crop=8, scale=(0.3, 1.0),
                aspect=(0.75, 1.35), flip=0.5, seed=0, decoder=decoder)
loader.first_clip()
print(asked[0], len(files), imported, peak(), time.process_time(), flush=True)
sys.stdin.read()
print(len(pickle.dumps(Mixture([(files, 1.0)]))))
"""


def write_lists(folder: Path, rows: int) -> dict[str, Path]:
    """The same files as an index, an official CSV and a CSV with weights."""
    from pyarrow import parquet, record_batch

    names = [f"videos/{i // 1000:04d}/{i:012x}.mp4" for i in range(rows)]
    places = {
        "index": folder / "a.index.parquet",
        "official CSV": folder / "official.csv",
        "CSV with weights": folder / "weights.csv",
    }
    schema = index_schema()
    fixed = {"weight": 1.0, "kind": "video", "size": 5_000_000, "mtime_ns": 1, "codec": "h264"}
    fixed |= {"frames": 300, "time_base": "1/12800", "fps": 25.0, "width": 640, "height": 360}
    fixed |= {"rotation": 0, "duration": 12.0}
    with parquet.ParquetWriter(places["index"], schema) as writer:
        for start in range(0, rows, 2**16):
            part = names[start : start + 2**16]
            readable = [i % 100 != 99 for i in range(start, start + len(part))]
            columns: dict[str, list[object]] = {
                name: [value] * len(part) for name, value in fixed.items()
            }
            columns["path"], columns["readable"] = list(part), list(readable)
            columns["reason"] = [None if good else "the file is empty" for good in readable]
            arrays = [columns[name] for name in schema.names]
            writer.write_batch(record_batch(arrays, schema=schema))
    places["official CSV"].write_text("".join(f"/data/{name} 0\n" for name in names))
    lines = (f"{name},{1 + i % 3}\n" for i, name in enumerate(names))
    places["CSV with weights"].write_text("path,weight\n" + "".join(lines))
    return places


def start(path: Path) -> dict[str, float]:
    """One fresh interpreter: from its start to the first plan."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", PLAN, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    seconds = time.perf_counter() - began
    if not line:
        raise SystemExit(f"{path}: no plan was made")
    sent, _ = process.communicate()
    _, files, imported, peak, processor = line.split()
    return {
        "seconds": seconds,
        "cpu_seconds": float(processor),
        "files": int(files),
        "peak_bytes": int(peak),
        "peak_bytes_after_imports": int(imported),
        "worker_bytes": int(sent),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        places = write_lists(Path(folder), chosen.rows)
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in places}
        for _ in range(chosen.repeats):
            for name, path in places.items():
                runs[name].append(start(path))
        sizes = {name: path.stat().st_size for name, path in places.items()}
    results = {
        "rows": chosen.rows,
        "repeats": chosen.repeats,
        "python": platform.python_version(),
        "medians": {
            name: {key: statistics.median(run[key] for run in found) for key in found[0]}
            for name, found in runs.items()
        },
        "seconds": {name: [run["seconds"] for run in found] for name, found in runs.items()},
        "list_bytes": sizes,
    }
    for name, found in results["medians"].items():
        print(
            f"{name:17} {found['seconds']:6.2f} s ({found['cpu_seconds']:.2f} s of processor), "
            f"peak {found['peak_bytes'] / 2**20:.0f} MiB "
            f"({found['peak_bytes_after_imports'] / 2**20:.0f} before), "
            f"a worker is sent {found['worker_bytes'] / 2**20:.0f} MiB"
        )
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
