"""kill -9 to a run on two ranks at random moments: does it go on as if nothing had been?

    python benchmarks/kill_training.py --kills 100 --json out.json

Runs of a small model on two ranks over gloo, at ZeRO stages 1, 2 and 3 in turn, write a checkpoint
every other step. Each is killed again and again: one rank or both, while it starts, at any moment
of its steps (most of such a step is reductions and gathers), or once a checkpoint is being
written; the same command then goes on. An uninterrupted run of each stage is the measure. After
every kill all checkpoints there must be readable and have the very files of the uninterrupted
run's, by SHA-256 (weights, moments, EMA, guard, state; not the random numbers of Python and NumPy,
from which nothing is drawn and which a process begins anew); logged losses, gradient norms and
health must be its numbers to the last digit. The rank that was left must end by itself
within `--timeout` seconds (no launcher ends it here; one that waits for a first rank that never
came waits about twice `engine.timeout`, which is 40). A run that has got to its end is compared
once more, and a new one begins.

Ranks are forked from this process, which has imported everything once: a start then takes a second
or two. The JSON is written after each kill; a larger `--kills` goes on from it, as does the same
one after `--minutes`. Exits with 1 after a failure.
"""

import argparse
import json
import math
import os
import platform
import random
import re
import signal
import socket
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.runtime.zero.muon.original_muon
import deepspeed.runtime.zero.stage3
import deepspeed.runtime.zero.stage_1_and_2
import torch
import torch._dynamo
import torch.utils.tensorboard

import fastjepa.build  # noqa: F401 (imported once, for all ranks)
from fastjepa.checkpoint import CheckpointError, load_checkpoint
from fastjepa.checkpoint.layout import newest_first
from fastjepa.checkpoint.manifest import read_manifest
from fastjepa.cli import main as fastjepa_main
from fastjepa.data.numbered import write_numbered
from fastjepa.durable import atomic_file
from fastjepa.observe.sinks import read_metrics

RANKS, STEPS, STAGES = 2, 20, (1, 2, 3)
MOMENTS = ("start", "any", "save")
COMPARED = re.compile(
    r"(loss|grad_norm|feature_std|target_std|effective_rank).*"
    "|step|target_drift|skipped|lr|weight_decay|ema_momentum|context_weight"
)
RECIPE = """
model:
  {{name: vit_tiny, width: 48, depth: 4, heads: 2,
   predictor: {{width: 48, depth: 2, heads: 2, mask_tokens: 2}}}}
data: {{video: {clips}, frames: 4, fps: 8, crop: 64, batch: 2, workers: 0}}
optim: {{lr: 1.0e-3, warmup: 2, ema: {{half_life: 5}}}}
train: {{steps: {steps}, log_every: 1, checkpoint_every: 2, keep_checkpoints: {keep}}}
engine: {{kind: deepspeed, device: cpu, dtype: float32, threads: 1, zero_stage: {stage},
         timeout: 40}}
observe: {{pictures: false}}
run: {{folder: {folder}}}
"""


class Launch:
    """Two ranks of the run of a recipe, by the real command."""

    def __init__(self, recipe: Path) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        self.log = recipe.with_suffix(".log")
        self.codes: dict[int, int | None] = {}
        for rank in range(RANKS):
            child = os.fork()
            if not child:
                self._be(rank, port, recipe)
            self.codes[child] = None

    def _be(self, rank: int, port: str, recipe: Path) -> None:
        out = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": "localhost", "MASTER_PORT": port,
        }  # fmt: skip
        code = 1
        try:
            fastjepa_main(["train", str(recipe)])
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def over(self) -> bool:
        """Whether every rank has ended."""
        for child, code in self.codes.items():
            if code is None:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    self.codes[child] = os.waitstatus_to_exitcode(status)
        return None not in self.codes.values()

    def kill(self, ranks: list[int]) -> None:
        """kill -9 to those that live."""
        children = list(self.codes)
        for rank in ranks:
            if self.codes[children[rank]] is None:
                os.kill(children[rank], signal.SIGKILL)

    def wait(self, timeout: float) -> bool:
        """Whether all have ended within `timeout` seconds, counted one by one; else they are
        killed: a pause of the whole machine is no hang."""
        for _ in range(int(timeout * 20)):
            if self.over():
                return True
            time.sleep(0.05)
        self.kill(list(range(RANKS)))
        while not self.over():
            time.sleep(0.05)
        return False


def write_recipe(place: Path, name: str, stage: int, keep: int) -> Path:
    path = place / f"{name}.yaml"
    path.write_text(
        RECIPE.format(
            clips=place / "clips", steps=STEPS, stage=stage, folder=place / name, keep=keep
        )
    )
    return path


def numbers(folder: Path) -> dict[int, dict[str, float]]:
    """What is compared of the logged steps."""
    path = folder / "metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []
    return {
        int(row["step"]): {key: x for key, x in row.items() if COMPARED.fullmatch(key)}
        for row in rows
    }


def faults(folder: Path, straight: Path) -> list[str]:
    """What differs from the uninterrupted run: unreadable or other checkpoints, other numbers."""
    found = []
    for path in newest_first(folder):
        try:
            load_checkpoint(path)
        except CheckpointError as error:
            found.append(f"unreadable: {error}")
            continue
        name = path.name.removesuffix(".replaced")
        wanted = read_manifest(straight / "checkpoints" / name).files
        here = read_manifest(path).files
        found += [
            f"{path / file}: other content"
            for file in wanted
            if here[file] != wanted[file] and file != "rng.safetensors"
        ]
    logged = numbers(straight)
    for step, row in numbers(folder).items():
        wrong = [key for key, value in logged[step].items() if row.get(key) != value]
        if wrong:
            found.append(f"step {step}: other {', '.join(wrong)}")
    return found


def writing(folder: Path, left: set[Path]) -> bool:
    """Whether a checkpoint is on its way to the disk, other than those `left` by earlier kills."""
    return not left.issuperset((folder / "checkpoints").glob(".tmp-step-*"))


def wait_for_moment(
    launch: Launch,
    folder: Path,
    moment: str,
    left: set[Path],
    draw: random.Random,
    spans: dict[str, float],
) -> None:
    """Until a moment to kill at has come, or the run is over."""
    begun = time.monotonic()
    if moment == "start":
        time.sleep(draw.uniform(0.0, spans["start"]))
        return
    # The first new step replaces what was logged beyond the checkpoint.
    log = folder / "metrics.jsonl"
    changed = log.stat().st_mtime_ns if log.exists() else 0
    while not launch.over() and (not log.exists() or log.stat().st_mtime_ns == changed):
        time.sleep(0.005)
    spans["start"] = time.monotonic() - begun
    if moment == "any":
        lines = log.read_bytes().count(b"\n")
        step = draw.randint(min(lines, STEPS - 1), STEPS - 1)
        while not launch.over() and log.read_bytes().count(b"\n") < step:
            time.sleep(0.005)
        time.sleep(draw.uniform(0.0, spans["step"]))
        return
    for _ in range(draw.randint(1, 3)):
        while not launch.over() and writing(folder, left):
            time.sleep(0.0005)
        while not launch.over() and not writing(folder, left):
            time.sleep(0.0005)
    time.sleep(draw.uniform(0.0, 0.03))


def kill_once(
    recipe: Path, number: int, spans: dict[str, float], timeout: float
) -> dict[str, Any] | None:
    """Kill number `number` of the run; None if it had got to its end first."""
    folder = recipe.with_suffix("")
    draw = random.Random(f"{number} {len(numbers(folder))}")
    ranks = draw.choice([[0], [1], [0, 1]])
    left = set((folder / "checkpoints").glob(".tmp-step-*"))
    launch = Launch(recipe)
    wait_for_moment(launch, folder, MOMENTS[number % 3], left, draw, spans)
    saving, logged = writing(folder, left), len(numbers(folder))
    if launch.over():
        return None
    launch.kill(ranks)
    begun = time.monotonic()
    ended = launch.wait(timeout)
    return {
        "kill": number,
        "drawn": MOMENTS[number % 3],
        "saving": saving,
        "logged_steps": logged,
        "ranks": ranks,
        "seconds_to_end": round(time.monotonic() - begun, 2),
        "faults": [] if ended else [f"hang: a rank lived on for {timeout:g} s"],
    }


def summary(kills: list[dict[str, Any]], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts, and what went wrong."""
    return {
        "format": "fastjepa kill training 1",
        "machine": platform.platform(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "ranks": RANKS,
        "steps": STEPS,
        "kills": len(kills),
        "failed": sum(bool(one["faults"]) for one in [*kills, *runs]),
        "while_saving": sum(kill["saving"] for kill in kills),
        "by_moment_drawn": dict(Counter(kill["drawn"] for kill in kills)),
        "by_rank": dict(Counter("both" if k["ranks"][1:] else str(k["ranks"][0]) for k in kills)),
        "runs_to_their_end": len(runs),
        "longest_seconds_to_end": max((kill["seconds_to_end"] for kill in kills), default=0.0),
        "runs": runs,
        "each": kills,
    }


def straight_run(place: Path, stage: int) -> tuple[Path, float]:
    """The folder of the uninterrupted run of a stage, and seconds a step."""
    recipe = write_recipe(place, f"straight-{stage}", stage, keep=STEPS)
    launch = Launch(recipe)
    if not launch.wait(600.0) or any(launch.codes.values()):
        sys.exit(f"the uninterrupted run failed: {launch.log.read_text()}")
    rows = read_metrics(recipe.with_suffix("") / "metrics.jsonl")
    return recipe.with_suffix(""), statistics.median(row["step_seconds"] for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--timeout", type=float, default=120.0)
    parser.add_argument("--stages", type=int, nargs="+", default=STAGES)
    parser.add_argument("--json", type=Path, required=True)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    deepspeed.utils.logger.setLevel("ERROR")
    kills: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    if chosen.json.exists():
        before = json.loads(chosen.json.read_text())
        kills, runs = before["each"], before["runs"]
    straight: dict[int, Path] = {}
    until = time.monotonic() + 60 * chosen.minutes
    spans = {"start": 3.0, "step": 0.2}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "clips").mkdir()
        for number in range(4):
            write_numbered(place / "clips", number, codec="h264")
        while len(kills) < chosen.kills and time.monotonic() < until:
            stage = chosen.stages[len(runs) % len(chosen.stages)]
            if stage not in straight:
                straight[stage], spans["step"] = straight_run(place, stage)
            recipe = write_recipe(place, f"run-{len(runs)}", stage, keep=2)
            its_kills = 0
            while (kill := kill_once(recipe, len(kills), spans, chosen.timeout)) is not None:
                kill |= {"stage": stage}
                kill["faults"] += faults(recipe.with_suffix(""), straight[stage])
                kills.append(kill)
                its_kills += 1
                print(kill, flush=True)
                with atomic_file(chosen.json) as file:
                    file.write(json.dumps(summary(kills, runs), indent=1).encode() + b"\n")
                if len(kills) >= chosen.kills or time.monotonic() > until:
                    launch = Launch(recipe)
                    launch.wait(600.0)
                    break
            wrong = faults(recipe.with_suffix(""), straight[stage])
            if len(numbers(recipe.with_suffix(""))) != STEPS:
                wrong.append(f"ended early: {recipe.with_suffix('.log').read_text()[-2000:]}")
            runs.append({"stage": stage, "kills": its_kills, "faults": wrong})
            print(runs[-1], flush=True)
        result = summary(kills, runs)
        with atomic_file(chosen.json) as file:
            file.write(json.dumps(result, indent=1).encode() + b"\n")
    shown = {key: value for key, value in result.items() if key not in ("each", "runs")}
    print(json.dumps(shown, indent=1))
    return int(bool(result["failed"]))


if __name__ == "__main__":
    sys.exit(main())
