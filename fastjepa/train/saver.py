"""Checkpoints written beside the training: the step copies, a thread writes, the ranks agree.

    saver.start(step, shares, alone, facts)   # copies are in the host's memory already
    saver.poll()                              # after each step: published once all have written
    saver.wait()                              # until it is

One checkpoint is in flight at a time. Every rank's thread writes and fsyncs the rank's own files;
no thread talks to another rank. The ranks ask each other in `poll`, between steps, and when all
have written the first one's thread writes the manifest and renames the folder. torch's own
asynchronous checkpoints would need tensors that it can shard, keep a pickle beside their files and
no checksums, so they are not used.
"""

import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from fastjepa.checkpoint.layout import begin, cannot_save, num_bytes, publish, state_text
from fastjepa.checkpoint.manifest import Written, write_shares
from fastjepa.checkpoint.pieces import Shares
from fastjepa.checkpoint.tensor_file import CheckpointError
from fastjepa.train.ranks import Ranks, RanksError

# What is left to do, each with what every rank's part before it came to.
_Part = Callable[[list[Any]], Any]


class SaveError(CheckpointError, RanksError):
    """A checkpoint could not be written on some rank; every rank raises it."""


class Saver:
    """Writes a run's checkpoints; all ranks must call the same methods in the same order.

    Each raises SaveError when a rank cannot write: earlier checkpoints stand, nothing is left
    behind.
    """

    def __init__(self, folder: Path, ranks: Ranks, keep: int) -> None:
        self._folder, self._ranks, self._keep = folder, ranks, keep
        self._working: Future[Any] | None = None
        self._left: list[_Part] = []
        self._step = self._bytes = 0
        self._temporary: Path | None = None

    def start(self, step: int, shares: Shares, alone: Shares, facts: Mapping[str, Any]) -> None:
        """Begin to write the checkpoint of `step`, once the one before it is complete.

        `shares`: this rank's pieces. `alone`: parts that the first rank writes, whole. `facts` go
        into its state. None of the tensors may change until it is complete.
        """
        self.wait()
        ranks = self._ranks
        self._step, self._bytes = step, sum(ranks.gather(num_bytes(shares)))
        text = state_text(step, facts)
        made = self._together(
            lambda: begin(self._folder, step, self._bytes) if ranks.first else None
        )
        self._temporary = temporary = Path(made[0])

        def write(_: list[Any]) -> Written:
            written = write_shares(temporary, shares, ranks.rank, ranks.size)
            if ranks.first:
                extra = write_shares(temporary, alone)
                written = Written(
                    {**written.files, **extra.files}, {**written.tables, **extra.tables}
                )
            return written

        def complete(written: list[Any]) -> None:
            if ranks.first:
                publish(temporary, written, text, self._keep)

        self._left = [write, complete]
        self._go_on([])

    def poll(self) -> None:
        """Go on with a checkpoint whose parts are written on all ranks."""
        while self._working and not self._ranks.any_on_host(not self._working.done()):
            self._agree()

    def wait(self) -> None:
        """Until no checkpoint is in flight."""
        while self._working:
            self._agree()

    def abandon(self, error: BaseException) -> None:
        """After an error: complete what is in flight where all ranks can, or else leave it.

        A disk that is full fails more than the checkpoint; this error is the one that says so.
        """
        if isinstance(error, Exception) and (
            self._ranks.size == 1 or isinstance(error, RanksError)
        ):
            self.wait()
        elif self._working and self._working.done():
            failure = self._working.exception()
            if isinstance(failure, OSError):
                raise self._failure(failure) from failure

    def _agree(self) -> None:
        assert self._working is not None
        working, self._working = self._working, None
        self._go_on(self._together(working.result))

    def _go_on(self, found: list[Any]) -> None:
        if self._left:
            part, self._left = self._left[0], self._left[1:]
            self._working = _beside(lambda: part(found))

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        """Every rank's result. Raises SaveError on all if one of them has failed."""
        result, caught = None, None
        try:
            result = work()
        except OSError as error:
            caught = error
        outcomes = self._ranks.gather((result, caught))
        failures = [failure for _, failure in outcomes if failure is not None]
        if failures:
            self._left = []
            if self._ranks.first and self._temporary is not None:
                shutil.rmtree(self._temporary, ignore_errors=True)
            raise self._failure(failures[0]) from failures[0]
        return [one for one, _ in outcomes]

    def _failure(self, error: OSError) -> SaveError:
        return SaveError(cannot_save(self._folder, self._step, self._bytes, error))


def _beside(work: Callable[[], Any]) -> "Future[Any]":
    """What `work` comes to in a thread of its own, for which the end of the process waits not."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # for whoever asks for the result
            future.set_exception(error)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return future
