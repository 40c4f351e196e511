"""kill -9 to data workers and trainers at random moments: what happens to a run, and what is left.

    unshare --mount sh -c 'mount -t tmpfs tmpfs /dev/shm &&
        python benchmarks/kill_loader.py --kills 200 --at-once 4 --json out.json'

Each time a trainer process of its own draws batches from two workers, and one of the three is
killed: while the workers start, at work, or while the loader is closed. A run whose worker was
killed must stop with an error that names the worker (or go on, if it was closing anyway); workers
of a killed trainer must end. Either within `--timeout` seconds, and with nothing left in /dev/shm,
which other programs must leave alone meanwhile (hence `unshare`). The JSON is written after each
round of kills; a larger `--kills` goes on from it. Exits with 1 after a failure.
"""

import argparse
import itertools
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch

from fastjepa.data.files import Entry
from fastjepa.data.loader import Loader, WorkerDiedError
from fastjepa.data.manifest import read_manifest
from fastjepa.data.numbered import write_numbered
from fastjepa.durable import atomic_file

SHARED = Path("/dev/shm")
PHASES = ("start", "work", "close")
FAILURES = ("hang", "bad end")
# What a trainer says when a phase begins.
SIGNS = {"start": "starting", "work": "first batch", "close": "closing"}


def masks(step: int) -> list[int]:
    """Extras of a batch, larger than a pipe holds."""
    return list(range(100_000))


def train(folder: str, phase: str) -> None:
    """Be the trainer: draw batches for ever, or close the loader after some."""
    # A list of files that is longer than a pipe holds, of which only the real ones are drawn.
    absent = [Entry(f"/absent/{number:06}.mp4", "video", 0.0) for number in range(20_000)]
    loader = Loader(
        datasets=[([*read_manifest(folder), *absent], 1.0)], batch=2, frames=4, fps=4.0, crop=32,
        scale=(0.3, 1.0), aspect=(0.75, 1.35), flip=0.5, seed=0, workers=2, extras=masks,
    )  # fmt: skip
    print("starting", flush=True)
    try:
        for batch in loader.batches(0, 10**9):
            if batch.step == 0:
                print("first batch", flush=True)
            if batch.step == 20 and phase == "close":
                print("closing", flush=True)
                break
        loader.close()
        print("closed", flush=True)
    except WorkerDiedError as error:
        print("died:", error, flush=True)


class Trainer:
    """A trainer process and all that descends from it."""

    def __init__(self, folder: str, phase: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--train", folder, phase], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.ps = psutil.Process(self.process.pid)
        self.family: set[psutil.Process] = set()

    def wait_for(self, sign: str) -> float:
        """Seconds until it has said so."""
        started = time.perf_counter()
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip() == sign:
                return time.perf_counter() - started
        raise RuntimeError(f"no {sign!r} from the trainer: {self.process.communicate()[1]}")

    def workers(self) -> list[psutil.Process]:
        """Its workers that live, in the order of their start."""
        try:
            children = self.ps.children(recursive=True)
            self.family |= set(children)
            return [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        except psutil.NoSuchProcess:
            return []

    def end(self, timeout: float) -> tuple[str, str, list[str]]:
        """Its output, its errors, and what lives on after `timeout` seconds.

        Counted second by second: a pause of the whole machine is no hang.
        """
        out = errors = ""
        ended = False
        alive = [self.ps, *self.family]
        for _ in range(int(timeout)):
            if not ended:
                try:
                    out, errors = self.process.communicate(timeout=1.0)
                    ended = True
                except subprocess.TimeoutExpired:
                    continue
            _, alive = psutil.wait_procs(alive, timeout=1.0)
            if not alive:
                break
        told = [f"{one.status()}: {' '.join(one.cmdline())}" for one in alive if one.is_running()]
        for process in alive:
            process.kill()
        if not ended:
            out, errors = self.process.communicate()
        return out, errors, told


def kill_once(folder: str, number: int, spans: dict[str, float], timeout: float) -> dict[str, Any]:
    """Kill number `number` and its outcome.

    `spans` holds about how long each phase lasts, for moments to be drawn from; a moment at which
    the run was over is drawn again.
    """
    victim, phase = ("worker", "trainer")[number % 2], PHASES[number // 2 % 3]
    for attempt in itertools.count():
        draw = random.Random(f"{number} {attempt}")
        trainer = Trainer(folder, phase)
        trainer.wait_for(SIGNS["start"])
        if phase != "start":
            spans["start"] = trainer.wait_for(SIGNS["work"])
        if phase == "close":
            trainer.workers()
            trainer.wait_for(SIGNS["close"])
        begun = time.perf_counter()
        time.sleep(draw.uniform(0.0, spans[phase]))
        which = draw.randrange(2)
        killed = trainer.ps
        workers = trainer.workers()
        if victim == "worker":
            while trainer.process.poll() is None and not workers[which:]:
                time.sleep(0.02)  # not started yet, or gone for good
                workers = trainer.workers()
            killed = workers[which] if workers[which:] else trainer.ps
        if trainer.process.poll() is None:
            break
        spans[phase] *= 0.8
        trainer.end(timeout)
    after = time.perf_counter() - begun
    killed.kill()
    started = time.perf_counter()
    out, errors, alive = trainer.end(timeout)
    code = trainer.process.returncode
    outcome = "bad end"
    if alive:
        outcome = "hang"
    elif victim == "trainer" and code == -signal.SIGKILL:
        outcome = "its workers ended"
    elif code == 0 and not errors and f"died: data worker {killed.pid} (exit code -9)" in out:
        outcome = "clear error"
    elif code == 0 and not errors and "closed" in out:
        outcome = "went on"
    return {
        "kill": number,
        "victim": victim,
        "phase": phase,
        "after_seconds": round(after, 3),
        "outcome": outcome,
        "seconds_to_end": round(time.perf_counter() - started, 3),
        "alive": alive,
        "said": (out + errors)[-2000:] if outcome in FAILURES else "",
    }


def summary(kills: list[dict[str, Any]], left: list[str]) -> dict[str, Any]:
    """Outcomes by victim and phase, and what went wrong."""
    outcomes = Counter(f"{k['victim']}, {k['phase']}: {k['outcome']}" for k in kills)
    return {
        "format": "fastjepa kill loader 1",
        "machine": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kills": len(kills),
        "failed": sum(kill["outcome"] in FAILURES for kill in kills),
        "left_in_shared_memory": left,
        "longest_seconds_to_end": max(kill["seconds_to_end"] for kill in kills),
        "outcomes": dict(sorted(outcomes.items())),
        "each": kills,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=120.0)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--train", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    kills: list[dict[str, Any]] = []
    left: list[str] = []
    if chosen.json.exists():
        before = json.loads(chosen.json.read_text())
        kills, left = before["each"], before["left_in_shared_memory"]
    spans = {"start": 5.0, "work": 1.0, "close": 0.2}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(chosen.at_once) as pool:
        for number in range(4):
            write_numbered(Path(folder), number, codec="h264")
        while len(kills) < chosen.kills:
            shared = set(os.listdir(SHARED))
            numbers = range(len(kills), min(chosen.kills, len(kills) + chosen.at_once))
            for found in pool.map(
                lambda number: kill_once(folder, number, spans, chosen.timeout), numbers
            ):
                kills.append(found)
                print({k: v for k, v in found.items() if v not in ("", [])}, flush=True)
            left += sorted(set(os.listdir(SHARED)) - shared)
            with atomic_file(chosen.json) as file:
                file.write(json.dumps(summary(kills, left), indent=1).encode() + b"\n")
    result = summary(kills, left)
    print(json.dumps({key: value for key, value in result.items() if key != "each"}, indent=1))
    return int(bool(result["failed"] or left))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train(*sys.argv[2:])
    else:
        sys.exit(main())
