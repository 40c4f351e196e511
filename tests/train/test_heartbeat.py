"""Two processes with a store between them: one falls silent, and the other does not wait for it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastjepa.train.heartbeat import BEAT

ROOT = Path(__file__).parents[2]
SILENCE = 5 * BEAT
# Rank 0 holds the store. Each leaves when its standard input ends.
RANK = """
import sys
from torch.distributed import TCPStore
from fastjepa.train.heartbeat import heartbeat
rank, port, silence = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
store = TCPStore("localhost", port, 2, is_master=rank == 0, wait_for_workers=False)
print(store.port, flush=True)
with heartbeat(store, rank=rank, size=2, silence=silence):
    print("begun", flush=True)
    sys.stdin.read()
print("left", flush=True)
"""


def start(rank: int, port: int) -> tuple[subprocess.Popen[str], int]:
    process = subprocess.Popen(
        [sys.executable, "-c", RANK, str(rank), str(port), str(SILENCE)], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def pair() -> list[subprocess.Popen[str]]:
    """Both ranks, counting."""
    first, port = start(0, 0)
    second, _ = start(1, port)
    for process in (first, second):
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
    return [first, second]


@pytest.mark.parametrize(
    ("frozen", "line"),
    [
        (0, "rank 1: error: ranks: nothing was heard of the node of the rendezvous for 10 s"),
        (1, "error: ranks: nothing was heard of rank 1 for 10 s"),
    ],
)
def test_a_frozen_rank_ends_the_other_with_a_line(frozen: int, line: str) -> None:
    both = pair()
    other = both[1 - frozen]
    os.kill(both[frozen].pid, signal.SIGSTOP)
    other.wait(timeout=300)
    _, told = other.communicate()
    both[frozen].kill()
    both[frozen].communicate()
    assert other.returncode == 2
    assert told.startswith(line)
    assert told.count("\n") == 1


def test_one_that_leaves_in_peace_is_not_missed() -> None:
    first, second = pair()
    second.communicate()
    assert second.returncode == 0
    with pytest.raises(subprocess.TimeoutExpired):
        first.wait(timeout=SILENCE + 2 * BEAT)
    out, told = first.communicate()
    assert (first.returncode, out, told) == (0, "left\n", "")
