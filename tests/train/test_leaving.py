"""A rank's process ends with its exit code, whatever gloo's threads are at."""

import subprocess
import sys

import pytest

# Gloo's thread is the last to hold a tensor of a collective, and is slow to let go of it: each nap
# waits for Python once more. An end without `leave` aborts it (Python 3.11, torch 2.13).
LETS_GO_LATE = """
import atexit, sys, threading, time
import torch
from torch import distributed as dist
from fastjepa.train.ranks import leave

begun = threading.Event()

class Slow(torch.Tensor):
    def __del__(self):
        begun.set()
        for _ in range(10_000):
            time.sleep(0.001)

dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
kept = dist.distributed_c10d._get_default_group()
kept.allreduce([torch.zeros(1 << 22).as_subclass(Slow)])
assert begun.wait(60)
dist.destroy_process_group()
threading.Thread(target=lambda: (time.sleep(0.2), print("thread done"))).start()
atexit.register(print, "exit functions run")
print("main done")
"""


@pytest.mark.parametrize("code", [0, 2])
def test_a_thread_that_lets_go_late_changes_no_exit_code(code: int) -> None:
    ended = _run(f"{LETS_GO_LATE}leave({code})")
    assert (ended.returncode, ended.stderr) == (code, "")
    assert ended.stdout.split("\n") == ["main done", "thread done", "exit functions run", ""]


def test_a_console_that_takes_no_more_changes_no_exit_code() -> None:
    assert (
        _run(f"{LETS_GO_LATE}sys.stdout = open('/dev/full', 'w')\nprint(1)\nleave(0)").returncode
        == 0
    )


def _run(script: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
