"""Waiting for what a running process does."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path


def wait_until(
    there: Callable[[], bool], process: subprocess.Popen[str], *, seconds: float
) -> None:
    """Until `there()`. AssertionError with the output of a process that ends before, or is killed
    after so many `seconds`."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        if there():
            return
        time.sleep(0.02)
    process.kill()
    raise AssertionError(f"it never came: {process.communicate(timeout=seconds)[0]}")


def wait_for_step(
    folder: Path, step: int, process: subprocess.Popen[str], *, seconds: float
) -> None:
    """Until metrics.jsonl holds `step` lines."""
    path = folder / "metrics.jsonl"
    wait_until(
        lambda: path.exists() and path.read_bytes().count(b"\n") >= step, process, seconds=seconds
    )


def wait_for_checkpoint(folder: Path, process: subprocess.Popen[str], *, seconds: float) -> None:
    """Until one is whole: it is written beside the training."""
    wait_until((folder / "checkpoints/latest").exists, process, seconds=seconds)
