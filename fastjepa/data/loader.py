"""Batches by number, made ahead in worker processes; a step is an index, so no order is saved.

    loader = Loader(datasets=[(read_manifest("clips/"), 1.0)], batch=4, frames=16, fps=4.0,
    crop=256,
                    scale=(0.3, 1.0), aspect=(0.75, 1.35), flip=0.5, seed=0, workers=2)
    for batch in loader.batches(0, 100): ...

Workers are spawned, not forked: the trainer runs threads and perhaps CUDA. They form process groups
of their own, so that Ctrl-C or a job's SIGTERM reaches the trainer alone, which still gets its last
batches; and they end themselves when the trainer is gone, however it went.
"""

import multiprocessing
import os
import pickle
import signal
import sys
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from inspect import GEN_CLOSED, getgeneratorstate
from mmap import ACCESS_READ, mmap
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from multiprocessing.reduction import DupFd
from multiprocessing.util import Finalize
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from fastjepa.data.batch import Batch, DeviceDecoder
from fastjepa.data.clip_source import ClipSource
from fastjepa.data.decoder import ClipDecoder
from fastjepa.data.files import Entry
from fastjepa.data.media import decode_media
from fastjepa.data.mixture import Mixture
from fastjepa.data.orphans import end_with_parent
from fastjepa.data.quarantine import Quarantine, TooManyBadFiles

_TRAINER_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class WorkerDiedError(OSError):
    """A worker process ended by itself, most often killed for want of memory."""


class Loader:
    """Clips of all steps, drawn from data sets by weight; a batch is pure in arguments and step.

    `datasets` pairs manifests with weights; `batch` clips of `frames` frames at `fps`, cropped to
    `crop` pixels (`scale`, `aspect`, `flip`: see `plan_clip`). `stream` sets apart loaders of one
    seed. `workers` processes (0: in this one) each hold up to `prefetch` batches ready.
    `extras(step)` is called in the worker, must be picklable, and its result travels as
    `Batch.extras`. `pin_memory` puts clips in pinned memory where there is an accelerator. With a
    `device_decoder` the workers cut what it can decode out of the files, and it makes the clips, in
    this process. Raises ValueError for an argument that cannot be.
    """

    def __init__(
        self,
        *,
        datasets: Sequence[tuple[Sequence[Entry], float]],
        batch: int,
        frames: int,
        fps: float,
        crop: int,
        scale: tuple[float, float],
        aspect: tuple[float, float],
        flip: float,
        seed: int,
        stream: int = 0,
        rank: int = 0,
        ranks: int = 1,
        workers: int = 0,
        prefetch: int = 2,
        max_bad_share: float = 0.5,
        extras: Callable[[int], object] | None = None,
        pin_memory: bool = False,
        decoder: ClipDecoder = decode_media,
        device_decoder: DeviceDecoder | None = None,
    ) -> None:
        _check(batch=batch, frames=frames, fps=fps, crop=crop, prefetch=prefetch)
        if not 0 <= rank < ranks:
            raise ValueError(f"rank is {rank}, expected 0 to ranks - 1 = {ranks - 1}")
        if not (0 <= seed < 2**64 and 0 <= stream < 2**64):
            raise ValueError(f"seed is {seed} and stream {stream}, expected 0 to 2**64 - 1")
        if workers < 0:
            raise ValueError(f"workers is {workers}, expected 0 or more")
        if not 0.0 < scale[0] <= scale[1] <= 1.0:
            raise ValueError(f"scale is {scale}, expected 0 < low <= high <= 1")
        if not 0.0 < aspect[0] <= aspect[1]:
            raise ValueError(f"aspect is {aspect}, expected 0 < low <= high")
        mixture = Mixture(datasets)
        self.num_files = mixture.num_files
        self._source = ClipSource(
            mixture=mixture,
            decoder=decoder,
            batch=batch,
            frames=frames,
            fps=fps,
            crop=crop,
            scale=scale,
            aspect=aspect,
            flip=flip,
            seed=seed,
            stream=stream,
            rank=rank,
            ranks=ranks,
            extras=extras,
            cutter=None if device_decoder is None else device_decoder.cutter,
        )
        self._device_decoder = device_decoder
        self._workers = workers
        self._prefetch = prefetch
        self._pin_memory = pin_memory and torch.accelerator.is_available()
        self._running: list[Generator[Batch, None, None]] = []
        # A worker that is still starting needs semaphores that multiprocessing takes away at exit.
        weakref.finalize(self, _close_all, self._running)
        self._quarantine = Quarantine(None, max_bad_share, mixture.num_files)

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield the batches of the steps start..stop-1, in order.

        Raises TooManyBadFiles when more than `max_bad_share` of the files were bad so far (the
        batch that showed it is still yielded) or a sample found none to read, and WorkerDiedError.
        """
        running = self._checked(start, stop)
        self._running[:] = [one for one in self._running if getgeneratorstate(one) != GEN_CLOSED]
        self._running.append(running)
        return running

    def first_clip(self) -> Batch:
        """The first sample alone, made here and now without extras. Raises TooManyBadFiles."""
        source = replace(self._source, batch=1, extras=None)
        with closing(self._decoded(iter([source[0]]), source)) as decoded:
            return next(decoded)

    def close(self) -> None:
        """End the iterators that are under way, and their workers."""
        _close_all(self._running)

    def _checked(self, start: int, stop: int) -> Generator[Batch, None, None]:
        made = self._in_workers(start, stop) if self._workers else self._in_process(start, stop)
        with closing(made), closing(self._decoded(made, self._source)) as decoded:
            for batch in decoded:
                excess = self._note(batch)
                yield batch
                if excess is not None:
                    raise excess

    def _decoded(self, made: Iterator[Batch], source: ClipSource) -> Generator[Batch, None, None]:
        if self._device_decoder is None:
            yield from made
        else:
            redraw = replace(source, cutter=None).sample
            yield from self._device_decoder.finish(
                made, redraw, batch=source.batch, crop=source.crop
            )

    def _note(self, batch: Batch) -> TooManyBadFiles | None:
        try:
            self._quarantine.add(batch.bad)
        except TooManyBadFiles as error:
            return error
        return None

    def _in_process(self, start: int, stop: int) -> Generator[Batch, None, None]:
        for step in range(start, stop):
            batch = self._source[step]
            yield batch._replace(clip=batch.clip.pin_memory()) if self._pin_memory else batch

    def _in_workers(self, start: int, stop: int) -> Generator[Batch, None, None]:
        if start >= stop:
            return
        loader: DataLoader[Any] = DataLoader(
            cast(Dataset[Any], _Answers(self._source)),
            sampler=range(start, stop),
            batch_size=None,
            num_workers=self._workers,
            prefetch_factor=self._prefetch,
            collate_fn=_as_it_is,
            pin_memory=self._pin_memory,
            worker_init_fn=_settle_in,
            multiprocessing_context=multiprocessing.get_context("spawn"),
            generator=torch.Generator(),  # its own: the run's random numbers stay untouched
        )
        with _signals_held_back():
            answers = cast(Any, iter(loader))
        try:
            for _ in range(start, stop):
                yield _next_batch(answers)
        finally:
            answers._shutdown_workers()
            # One that is still starting needs the queues, if only to find that it is over.
            for worker in answers._workers:
                worker.join(timeout=60.0)


def _close_all(running: list[Generator[Batch, None, None]]) -> None:
    while running:
        running.pop().close()


class _Answers:
    """A source whose answers are one or two tensors: the clip, if any, and the rest in bytes.

    Tensors travel in shared memory and only their handles, some hundred bytes, through the workers'
    common pipe. A longer message could be cut in two by a kill, and the trainer would wait for its
    other half for ever. A complaint about bad files is an answer too; raised in the worker, it
    would arrive buried in a traceback.

    The source itself goes to a starting worker in an unnamed file: a long list of files would not
    fit into the pipe that it starts with, and the trainer would wait for ever for a worker that was
    killed before it read on.
    """

    def __init__(self, source: ClipSource) -> None:
        self._source = source
        self._file = TemporaryFile()  # noqa: SIM115 (open as long as workers may start)
        pickle.dump(source, self._file)
        self._file.flush()

    def __reduce__(self) -> tuple[Callable[..., "_Answers"], tuple[Any]]:
        return _Answers._opened, (DupFd(self._file.fileno()),)

    @classmethod
    def _opened(cls, descriptor: Any) -> "_Answers":
        answers = cls.__new__(cls)
        # Workers share the file's position, so it is not read but mapped.
        with (
            open(descriptor.detach(), "rb") as file,
            mmap(file.fileno(), 0, access=ACCESS_READ) as mapped,
        ):
            answers._source = pickle.loads(mapped)
        return answers

    def __getitem__(self, step: int) -> list[Tensor]:
        try:
            batch = self._source[step]
        except TooManyBadFiles as error:
            return [_packed(error)]
        rest = (batch.step, batch.extras, batch.bad, batch.parts)
        return [_packed(rest), batch.clip]


def _packed(rest: object) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(rest)), dtype=torch.uint8)


def _next_batch(answers: Any) -> Batch:
    try:
        packed, *clip = cast(list[Tensor], next(answers))
    except (RuntimeError, OSError, EOFError) as error:
        # A dying process closes its pipes a moment before it counts as dead.
        ended = wait([worker.sentinel for worker in answers._workers], timeout=1.0)
        dead = [worker for worker in answers._workers if worker.sentinel in ended]
        if not dead:
            raise
        raise WorkerDiedError(_obituary(dead)) from error
    rest = pickle.loads(packed.numpy().tobytes())
    if isinstance(rest, TooManyBadFiles):
        raise rest
    step, extras, bad, parts = rest
    return Batch(step, clip[0], extras, bad, parts)


def _obituary(dead: Sequence[SpawnProcess]) -> str:
    for worker in dead:
        worker.join(timeout=1.0)
        _clear_away(worker)
    ends = ", ".join(f"{worker.pid} (exit code {worker.exitcode})" for worker in dead)
    hint = ""
    if any(worker.exitcode in (-signal.SIGKILL, -signal.SIGBUS) for worker in dead):
        hint = (
            "; if nobody killed it, memory or /dev/shm ran out: "
            "use fewer workers, less prefetch or a smaller batch"
        )
    return f"data worker {ends} ended while batches were being made{hint}"


def _clear_away(worker: SpawnProcess) -> None:
    """Shared memory that a worker was making when it was killed: PyTorch names it after the process
    and takes the name away at once, but no sooner."""
    for left in Path("/dev/shm").glob(f"torch_{worker.pid}_*"):
        left.unlink(missing_ok=True)


def _as_it_is(answer: object) -> object:
    return answer


def _settle_in(worker: int) -> None:
    """First thing in a worker: leave signals to the trainer, and never outlive it."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # forgets one that was meant for the trainer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _TRAINER_SIGNALS)
    end_with_parent()
    # Last of all exit handlers: a queue that must be emptied is joined at priority -5.
    Finalize(None, _leave, exitpriority=-100)


def _leave() -> None:
    """Skip the interpreter's own clean-up, in which torch aborts a thread that still sends."""
    if sys.exc_info()[0] is None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Start workers in here: they inherit blocked signals, and torch sets no SIGCHLD handler.

    That handler would raise a worker's death in the middle of a training step, a checkpoint or the
    start itself; without it the death shows where the next batch is asked for.
    """
    resource_tracker.ensure_running()  # its first start would unblock the signals held back here
    there_already = signal_handling._SIGCHLD_handler_set
    signal_handling._SIGCHLD_handler_set = True
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _TRAINER_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal_handling._SIGCHLD_handler_set = there_already


def _check(**positive: float) -> None:
    for name, value in positive.items():
        if not value > 0:
            raise ValueError(f"{name} is {value}, expected more than 0")
