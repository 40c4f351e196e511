"""Ranks on one machine: the same command once for each, through torch's elastic launcher.

    code = launch(["train", "configs/demo.yaml"], ranks=2)

What they print goes where this process prints. A port is chosen that is free, and the cores are
shared out. When one rank ends with an error the others are ended, and a signal is handed on to all.
After a signal torch's launcher does not tell how the ranks ended: they do, each in a file.
"""

import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from fastjepa.train.ranks import LostRankError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

# A rank that was sent a signal saves its checkpoint in this time, in seconds; then it is killed.
GRACE = 300
# Where the ranks that we started tell how they ended: a folder, a file each.
_ENDINGS = "FASTJEPA_ENDINGS"


def launch(arguments: Sequence[str], *, ranks: int) -> int:
    """Run `fastjepa ARGUMENTS` on `ranks` processes; the exit code of the one that failed, or 0.

    Raises LostRankError when a rank was killed.
    """
    with TemporaryDirectory(prefix="fastjepa-") as endings:
        os.environ[_ENDINGS] = endings
        try:
            return _launch(arguments, ranks, Path(endings))
        finally:
            del os.environ[_ENDINGS]


def launched() -> bool:
    """Whether this process is a rank that `launch` started."""
    return _ENDINGS in os.environ


@contextmanager
def ending_told() -> Iterator[None]:
    """A rank's part: how the block ends is told to `launch`, if that started it."""
    try:
        yield
    except (ValueError, OSError):
        _tell(2)
        raise
    _tell(0)


def _tell(code: int) -> None:
    if launched():
        Path(os.environ[_ENDINGS], os.environ["RANK"]).write_text(str(code), encoding="utf-8")


def first_to_fail(failures: Mapping[int, "ProcessFailure"]) -> tuple[int, "ProcessFailure"]:
    """The rank that the others failed by, of those that torch's launcher found ended.

    It looks at them ten times a second and cannot tell which was first. One that was killed brings
    the others to an end, and is not brought to it by them: the launcher ends what is left by
    SIGTERM, and by SIGKILL after GRACE.
    """
    earliest = min(failure.timestamp for failure in failures.values())
    killed = [
        rank
        for rank, failure in failures.items()
        if failure.exitcode < 0
        and failure.exitcode != -signal.SIGTERM
        and failure.timestamp < earliest + GRACE
    ]
    rank = min(killed or failures, key=lambda rank: failures[rank].timestamp)
    return rank, failures[rank]


def _launch(arguments: Sequence[str], ranks: int, endings: Path) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # It tells in many lines what the rank itself, or we below, say in one.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    # Each rank would take all cores; `engine.threads` and a value that is set go before this.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // ranks)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        shutdown_timeout=GRACE,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "fastjepa.cli", *arguments)
    except ChildFailedError as error:
        rank, failure = first_to_fail(error.failures)
        if failure.exitcode > 0:
            return failure.exitcode  # and the rank has said why
        raise LostRankError(
            f"ranks: rank {rank} was killed by signal {-failure.exitcode}; the others were ended; "
            "the last checkpoint stands, and the same command goes on from it"
        ) from error
    except SignalException as error:
        told = [int(file.read_text(encoding="utf-8")) for file in endings.iterdir()]
        if any(told):
            return max(told)  # and the rank has said why
        if len(told) < ranks:
            raise LostRankError(
                f"ranks: {ranks - len(told)} of {ranks} ended without a save after "
                f"{signal.Signals(error.sigval).name}; the last checkpoint stands, and the same "
                "command goes on from it"
            ) from error
        # The ranks have saved and said so.
        return 0 if error.sigval in (signal.SIGTERM, signal.SIGINT) else 1
    return 0
