"""Two ranks and a store: one falls silent, and the others do not wait for it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastjepa.train.heartbeat import BEAT

ROOT = Path(__file__).parents[2]
SILENCE = 3 * BEAT
# Each leaves when its standard input ends.
STORE = """
import sys
from torch.distributed import TCPStore
store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""
RANK = """
import sys
from torch.distributed import TCPStore
from fastjepa.train.heartbeat import heartbeat
port, rank, silence = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
store = TCPStore("localhost", port, is_master=False, wait_for_workers=False)
with heartbeat(store, rank=rank, size=2, silence=silence):
    print("begun", flush=True)
    sys.stdin.read()
print("left", flush=True)
"""

Process = subprocess.Popen[str]


def start(program: str, *arguments: object) -> Process:
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def said(process: Process) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.fixture
def processes() -> Iterator[dict[str, Process]]:
    """A store and both its ranks, counting."""
    started = {"store": start(STORE)}
    port = said(started["store"])
    for rank in (0, 1):
        started[f"rank {rank}"] = start(RANK, port, rank, SILENCE)
    assert [said(started[f"rank {rank}"]) for rank in (0, 1)] == ["begun", "begun"]
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("frozen", "line"),
    [
        (["rank 1"], "error: ranks: nothing was heard of rank 1 for 6 s"),
        (["rank 0"], "rank 1: error: ranks: nothing was heard of rank 0 for 6 s"),
        (
            ["rank 0", "store"],
            "rank 1: error: ranks: nothing was heard of the node of the rendezvous for 6 s",
        ),
    ],
    ids=lambda value: " and ".join(value) if isinstance(value, list) else "",
)
def test_what_is_frozen_ends_the_other_rank_with_a_line(
    processes: dict[str, Process], frozen: list[str], line: str
) -> None:
    """A store that answers a last time after its node's rank fell silent is the hardest to tell."""
    for name in frozen:
        os.kill(processes[name].pid, signal.SIGSTOP)
        time.sleep(BEAT)
    other = processes["rank 0" if "rank 1" in frozen else "rank 1"]
    other.wait(timeout=300)
    _, told = other.communicate()
    assert other.returncode == 2
    assert told.startswith(line)
    assert told.count("\n") == 1


def test_one_that_leaves_in_peace_is_not_missed(processes: dict[str, Process]) -> None:
    first, second = processes["rank 0"], processes["rank 1"]
    second.communicate()
    assert second.returncode == 0
    with pytest.raises(subprocess.TimeoutExpired):
        first.wait(timeout=SILENCE + 2 * BEAT)
    out, told = first.communicate()
    assert (first.returncode, out, told) == (0, "left\n", "")
