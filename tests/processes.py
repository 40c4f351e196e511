"""Starting real commands and waiting for what they do, but not for ever.

Seconds are counted in naps: while the whole machine pauses, a command has no time either.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
# For a run to come to something, on a machine as busy as may be.
LONG = 300.0
NAP = 0.05


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """`python -m ARGUMENTS`; its output is collected."""
    return subprocess.Popen(
        [sys.executable, "-m", *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], *, seconds: float = LONG) -> tuple[int, str]:
    """Exit code and output. Raises subprocess.TimeoutExpired, with the output, after `seconds`."""
    for left in reversed(range(round(seconds / NAP))):
        try:
            out, _ = process.communicate(timeout=NAP)
            break
        except subprocess.TimeoutExpired:
            if not left:
                raise
    return process.returncode, out


def run_ranks(command: list[str], *, seconds: float = LONG) -> str:
    """The output of a command that starts ranks, with one thread each.

    AssertionError with the output if it fails, or takes more than `seconds`: then it and all that
    it started say where they are, and are killed.
    """
    process = subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
        start_new_session=True,
    )  # fmt: skip
    try:
        code, out = finish(process, seconds=seconds)
    except subprocess.TimeoutExpired:
        # Python's handler of SIGABRT writes the stacks of all threads.
        end([psutil.Process(process.pid)], signal.SIGABRT)
        out, _ = process.communicate(timeout=LONG)
        raise AssertionError(f"not over after {seconds:g} s: {command}\n{out}") from None
    assert code == 0, out
    return out


def end(processes: list[psutil.Process], first: signal.Signals = signal.SIGKILL) -> None:
    """Kill these and all below them, in whatever sessions they are: a rank whose launcher is gone
    would go on. Those that do not end by the `first` signal get SIGKILL."""
    family = list(processes)
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            family += process.children(recursive=True)
    for number in (first, signal.SIGKILL):
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        _, family = psutil.wait_procs(family, timeout=10)


def wait_until(
    there: Callable[[], bool], process: subprocess.Popen[str], *, seconds: float = LONG
) -> None:
    """Until `there()`. AssertionError with the output of a process that ends before, or is killed
    after so many `seconds`."""
    for _ in range(round(seconds / NAP)):
        if process.poll() is not None:
            break
        if there():
            return
        time.sleep(NAP)
    process.kill()
    raise AssertionError(f"it never came: {process.communicate(timeout=seconds)[0]}")


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until metrics.jsonl holds `step` lines."""
    path = folder / "metrics.jsonl"
    wait_until(lambda: path.exists() and path.read_bytes().count(b"\n") >= step, process)


def wait_for_checkpoint(folder: Path, process: subprocess.Popen[str]) -> None:
    """Until one is whole: it is written beside the training."""
    wait_until((folder / "checkpoints/latest").exists, process)
