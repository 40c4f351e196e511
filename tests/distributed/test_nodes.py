"""Two nodes (two torchruns on loopback) and what a cut, a freeze or a kill leaves behind.

A frozen node stands for one that is cut off: its connections stay open, and nothing comes.
"""

import importlib.util
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from ..processes import finish, start, wait_for_checkpoint, wait_for_step, wait_until
from .conftest import free_port, recipe, rows

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

# What the issue allows from the loss of a node to the end of the others, in seconds.
A_MINUTE = 60
TORCHRUN = "torch.distributed.run"
OVERRIDES = ("engine.zero_stage=2", "observe.pictures=false", "engine.heartbeat=10")

Node = subprocess.Popen[str]


def family(node: Node) -> list[psutil.Process]:
    """The launcher and all that it has started."""
    launcher = psutil.Process(node.pid)
    return [launcher, *launcher.children(recursive=True)]


def send(node: Node, number: signal.Signals) -> None:
    """One signal to everything on a node, the launcher first."""
    for process in family(node):
        process.send_signal(number)


@pytest.fixture
def two_nodes(tmp_path: Path) -> Iterator[Callable[..., tuple[Node, Node]]]:
    """Starts a run of two nodes with a rank each; what is left of them at the end is killed."""
    started: list[Node] = []

    def launch(path: Path, *overrides: str) -> tuple[Node, Node]:
        port = free_port()
        where = f"localhost:{port}"
        for number in (0, 1):
            if number:  # the first node holds the rendezvous
                wait_until(partial(listens, int(port)), started[0])
            started.append(
                start(
                    TORCHRUN, "--nnodes=2", "--nproc-per-node=1", f"--node-rank={number}",
                    "--rdzv-backend=c10d", f"--rdzv-endpoint={where}", f"--rdzv-id={tmp_path.name}",
                    "-m", "fastjepa.cli", "train", str(path), *OVERRIDES, *overrides,
                )
            )  # fmt: skip
        return started[0], started[1]

    yield launch
    for node in started:
        if node.poll() is None:
            send(node, signal.SIGCONT)
            send(node, signal.SIGKILL)
        finish(node)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0


def errors(out: str) -> list[str]:
    """Our own lines, among those of torchrun."""
    return [line for line in out.splitlines() if "error: ranks: " in line]


def test_two_nodes_train_and_one_killed_ends_the_other(
    tmp_path: Path, two_nodes: Callable[..., tuple[Node, Node]]
) -> None:
    folder = tmp_path / "run"
    first, second = two_nodes(recipe(folder, steps=1000))
    wait_for_checkpoint(folder, first)
    send(second, signal.SIGKILL)
    code, out = finish(first, seconds=A_MINUTE)
    assert code != 0
    assert len(errors(out)) == 1, out
    assert "the last checkpoint stands" in errors(out)[0]


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [0, 1], ids=["with the rendezvous", "without the rendezvous"])
def test_a_frozen_node_ends_the_other(
    tmp_path: Path, two_nodes: Callable[..., tuple[Node, Node]], frozen: int
) -> None:
    folder = tmp_path / "run"
    nodes = two_nodes(recipe(folder, steps=1000))
    wait_for_step(folder, 2, nodes[0])
    send(nodes[frozen], signal.SIGSTOP)
    code, out = finish(nodes[1 - frozen], seconds=A_MINUTE)
    assert code != 0
    (line,) = errors(out)
    assert "nothing was heard of" in line
    assert "for 10 s (engine.heartbeat)" in line


def test_torchrun_starts_a_killed_run_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = start(
        TORCHRUN, "--standalone", "--nproc-per-node=2", "--max-restarts=1",
        "-m", "fastjepa.cli", "train", str(recipe(folder, steps=20)), *OVERRIDES,
    )  # fmt: skip
    wait_for_checkpoint(folder, run)
    ranks = [child for child in psutil.Process(run.pid).children() if "train" in child.cmdline()]
    os.kill(ranks[-1].pid, signal.SIGKILL)
    code, out = finish(run)
    assert code == 0, out
    assert "resumed from" in out
    assert [row["step"] for row in rows(folder)] == list(range(1, 21))
