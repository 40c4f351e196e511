"""Workers and the trainer end in every way there is: nothing hangs, nothing is left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from ..processes import end

# Seconds after which what has not ended never will, on the busiest machine.
HANG = 120

TRAINER = """
import multiprocessing, os, signal, sys, time
from fastjepa.data.files import Entry
from fastjepa.data.loader import Loader, WorkerDiedError
from fastjepa.data.manifest import read_manifest


def masks(step):
    return list(range(100_000))  # larger than a pipe holds


def main():
    # Longer than a pipe holds, and of no weight.
    absent = [Entry(f"/absent/{number:06}.mp4", "video", 0.0) for number in range(20_000)]
    loader = Loader(
        datasets=[([*read_manifest(sys.argv[1]), *absent], 1.0)],
        batch=2, frames=4, fps=4.0, crop=32, scale=(0.3, 1.0), aspect=(0.75, 1.35), flip=0.5,
        seed=0, workers=2, extras=masks,
    )
    signals = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number))
    batches = loader.batches(0, 10**9)
    for batch in batches:
        if batch.step == 0:
            workers = multiprocessing.active_children()
            print("workers", *(worker.pid for worker in workers), flush=True)
            if sys.argv[2] == "leave":
                loader.close()
                print("left", len(multiprocessing.active_children()), flush=True)
                next(loader.batches(0, 10**9))
                print("forgot", len(multiprocessing.active_children()), flush=True)
                return
            if sys.argv[2] == "wait":
                input()
            if sys.argv[2] == "signal":
                while len(signals) < 2:
                    time.sleep(0.01)
        if batch.step == 12 and signals:
            print("went on after", *sorted(signals), flush=True)
            return


if __name__ == "__main__":
    try:
        main()
    except WorkerDiedError as error:
        print("died", error, flush=True)
"""


class Trainer:
    """A real trainer process, its two workers, and what was in shared memory before."""

    def __init__(self, folder: Path, clips: Path, behaviour: str, **environment: str) -> None:
        script = folder / "trainer.py"
        script.write_text(TRAINER)
        self.shared_before = set(os.listdir("/dev/shm"))
        self.workers: list[psutil.Process] = []
        self.family: list[psutil.Process] = []
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(clips), behaviour],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )

    def await_workers(self) -> None:
        line = self.process.stdout.readline()
        assert line.startswith("workers"), line + self.process.stderr.read()
        self.workers = [psutil.Process(int(pid)) for pid in line.split()[1:]]
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    def kill_first_worker(self) -> int:
        """Kill the first worker as soon as it exists; returns its number."""
        process = psutil.Process(self.process.pid)
        deadline = time.monotonic() + HANG
        while self.process.poll() is None and time.monotonic() < deadline:
            for child in process.children():
                if "spawn_main" in " ".join(child.cmdline()):
                    child.kill()
                    self.family = process.children(recursive=True)
                    return child.pid
            time.sleep(0.001)
        end([process])
        raise AssertionError(self.process.communicate())

    def end(self) -> None:
        """Whatever has become of it."""
        family = [*self.workers, *self.family]
        end([psutil.Process(self.process.pid), *family] if self.process.poll() is None else family)
        self.process.communicate()

    def finish(self) -> str:
        """Output of a trainer that ends by itself: soon, or this is a hang."""
        out, errors = self.process.communicate(timeout=HANG)
        assert self.process.returncode == 0, errors
        assert errors == ""
        return out

    def nothing_left(self) -> None:
        _, alive = psutil.wait_procs(self.family, timeout=HANG)
        assert alive == []
        deadline = time.monotonic() + HANG
        while (left := self._left_in_shared_memory()) and time.monotonic() < deadline:
            time.sleep(0.1)  # or it is another program's, which is ending
        assert not left

    def _left_in_shared_memory(self) -> set[str]:
        """What is new there and used by no process at all: other programs come and go."""
        new = set(os.listdir("/dev/shm")) - self.shared_before
        used = ""
        for maps in Path("/proc").glob("[0-9]*/maps"):
            with suppress(OSError):
                used += maps.read_text()
        return {name for name in new if f"/dev/shm/{name}" not in used}


@pytest.fixture
def start(tmp_path: Path, clips: Path) -> Iterator[Callable[..., list[Trainer]]]:
    started: list[Trainer] = []

    def begin(*behaviours: str) -> list[Trainer]:
        started.extend(Trainer(tmp_path, clips, behaviour) for behaviour in behaviours)
        for trainer in started:
            trainer.await_workers()
        return started

    yield begin
    for trainer in started:
        trainer.end()


def test_a_killed_worker_is_a_clear_error(start: Callable[..., list[Trainer]]) -> None:
    (trainer,) = start("wait")
    # As a worker leaves it that is killed between making memory and taking its name away.
    Path(f"/dev/shm/torch_{trainer.workers[0].pid}_0_0").write_bytes(b"clip")
    trainer.workers[0].kill()
    trainer.process.stdin.write("\n")
    out = trainer.finish()
    assert f"died data worker {trainer.workers[0].pid} (exit code -9) ended" in out
    assert "/dev/shm" in out
    trainer.nothing_left()


def test_a_worker_killed_before_it_has_read_its_list_of_files(tmp_path: Path, clips: Path) -> None:
    # Once in some fifty times, on a busy machine, multiprocessing warns of a semaphore that is gone
    # already: it counts what a process killed while it starts has not signed off.
    quiet = "ignore:resource_tracker"
    trainer = Trainer(tmp_path, clips, "run", PYTHONWARNINGS=quiet)
    try:
        pid = trainer.kill_first_worker()
        assert f"died data worker {pid} (exit code -9) ended" in trainer.finish()
        trainer.nothing_left()
    finally:
        trainer.end()


def test_a_worker_killed_at_work(start: Callable[..., list[Trainer]]) -> None:
    (trainer,) = start("run")
    time.sleep(0.3)
    trainer.workers[1].kill()
    assert "died data worker" in trainer.finish()
    trainer.nothing_left()


def test_a_killed_trainer_leaves_no_worker_behind(start: Callable[..., list[Trainer]]) -> None:
    """Whether its workers are at work or stuck sending what nobody will read."""
    trainers = start("run", "wait")
    time.sleep(0.5)
    for trainer in trainers:
        trainer.process.kill()
    for trainer in trainers:
        trainer.process.wait(timeout=HANG)
        _, alive = psutil.wait_procs(trainer.family, timeout=HANG)
        assert alive == []
    trainers[0].nothing_left()


def test_signals_to_the_whole_group_reach_the_trainer_alone(
    start: Callable[..., list[Trainer]],
) -> None:
    """Ctrl-C in a terminal, `timeout`, or a scheduler: the trainer still gets its batches."""
    (trainer,) = start("signal")
    os.killpg(trainer.process.pid, signal.SIGINT)
    os.killpg(trainer.process.pid, signal.SIGTERM)
    assert "went on after 2 15" in trainer.finish()
    trainer.nothing_left()


def test_leaving_early_by_close_or_by_forgetting(start: Callable[..., list[Trainer]]) -> None:
    (trainer,) = start("leave")
    assert trainer.finish() == "left 0\nforgot 2\n"
    trainer.nothing_left()
