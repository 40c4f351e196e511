"""Files probed in worker processes, each of which a file may kill or hang: it costs that file only.

for row, facts in probe_all(enumerate(files), cache=Cache(), workers=4, limit=60.0): ...
"""

import multiprocessing
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from fastjepa.data.cache import Cache
from fastjepa.data.files import Entry
from fastjepa.data.orphans import end_with_parent
from fastjepa.data.probe import Facts, probe

# Seconds in which a new process has to say that it is there.
_PATIENCE = 300.0
_READY = "ready"


@dataclass
class _Worker:
    """One process; `row` is the file it is at, None while it starts or waits."""

    process: SpawnProcess
    pipe: Connection
    row: int | None = None
    deadline: float = field(default_factory=lambda: time.monotonic() + _PATIENCE)

    def end(self) -> int | None:
        """Kill it if need be; its exit code."""
        self.process.kill()
        self.process.join()
        self.pipe.close()
        return self.process.exitcode


def probe_all(
    files: Iterable[tuple[int, Entry]], *, cache: Cache, workers: int, limit: float
) -> Iterator[tuple[int, Facts]]:
    """Yield the facts of each numbered file, as they come.

    A file at which a process is longer than `limit` seconds, or ends, is not readable. Raises
    OSError when a process cannot even start.
    """
    todo = iter(files)
    pool: list[_Worker] = []
    try:
        pool.extend(_start(cache) for _ in range(workers))
        while pool:
            ready = wait([w.pipe for w in pool], min(w.deadline for w in pool) - time.monotonic())
            for worker in list(pool):
                if worker.pipe in ready:
                    answer = _answer(worker)
                elif worker.deadline < time.monotonic():
                    answer = Facts(reason=f"probe took longer than {limit:g} s")
                    _check_started(worker)
                    worker.end()
                else:
                    continue
                if answer is not None and worker.row is not None:
                    yield worker.row, answer
                if worker.pipe.closed:
                    pool[pool.index(worker)] = worker = _start(cache)
                else:
                    _give(worker, todo, limit, pool)
    finally:
        for worker in pool:
            worker.end()


def _answer(worker: _Worker) -> Facts | None:
    """A worker's facts; None when it says that it is ready; killed, when it says no more."""
    try:
        said = worker.pipe.recv()
    except (EOFError, OSError):
        code = worker.end()
        _check_started(worker)
        return Facts(reason=f"killed the process that probed it (exit code {code})")
    return said if isinstance(said, Facts) else None


def _check_started(worker: _Worker) -> None:
    if worker.row is None:
        code = worker.process.exitcode
        raise OSError(f"a process to probe files in did not start (exit code {code})")


def _give(
    worker: _Worker, todo: Iterator[tuple[int, Entry]], limit: float, pool: list[_Worker]
) -> None:
    """The next file, or the end."""
    following = next(todo, None)
    if following is None:
        pool.remove(worker)
        worker.end()
        return
    row, entry = following
    worker.row, worker.deadline = row, time.monotonic() + limit
    with suppress(BrokenPipeError):  # its end is seen in the next round
        worker.pipe.send(entry)


def _start(cache: Cache) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, cache), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _work(pipe: Connection, cache: Cache) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    end_with_parent()
    pipe.send(_READY)
    while True:
        entry = pipe.recv()
        pipe.send(probe(entry.path, entry.kind, cache))
