"""One run on ever other ranks, for test_checkpoints.py: checkpoints_worker.py FOLDER OUT.json

Each launch goes on from the checkpoint of the one before. Ranks are forked from this process, which
has imported everything once.
"""

import hashlib
import importlib
import json
import os
import pickle
import resource
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from problem import CPU, alone, guard, micro_batches, networks, state

from fastjepa.build import build
from fastjepa.checkpoint import CheckpointError
from fastjepa.checkpoint.layout import newest_first, num_bytes
from fastjepa.config.load import load_recipe
from fastjepa.data.augment import normalise
from fastjepa.data.batch import Batch, BatchSource
from fastjepa.data.numbered import write_numbered
from fastjepa.observe.console import Console
from fastjepa.observe.sinks import read_metrics
from fastjepa.train.engine import Engine
from fastjepa.train.engine_deepspeed import DeepSpeedEngine, _import_deepspeed
from fastjepa.train.ranks import Ranks, RanksError, join
from fastjepa.train.saver import Saver
from fastjepa.train.signals import StopRequest
from fastjepa.train.state import restore, resume, save
from fastjepa.train.step import train_step

# A step takes the clips of so many ranks, whoever takes them.
SHARES = 8
STEPS = 2


@dataclass(frozen=True)
class Launch:
    """`stage` None is the engine of one process."""

    size: int
    stage: int | None


LAUNCHES = (Launch(8, 2), Launch(2, 3), Launch(1, None), Launch(4, 1), Launch(2, 0))


def engine_of(launch: Launch, ranks: Ranks, seed: int) -> tuple[Any, Engine]:
    jepa = networks(seed)
    if launch.stage is None:
        return jepa, alone(jepa)
    made = DeepSpeedEngine(
        encoder=jepa.encoder, predictor=jepa.predictor, target=jepa.target, ranks=ranks,
        device=CPU, stage=launch.stage, weight_decay=0.1, dtype=torch.float32,
        communication_dtype=torch.float32,
    )  # fmt: skip
    return jepa, made


def train(jepa: Any, engine: Engine, steps: range) -> list[float]:
    """Losses of steps on this rank's part of each step's clips."""
    own, per = engine.ranks.rank, SHARES // engine.ranks.size
    losses = []
    for step in steps:
        batches = micro_batches(step, range(own * per, (own + 1) * per), num=2, share=1 / per)
        report = train_step(
            jepa, engine, guard(), batches, step=step, lr=1e-3, weight_decay=0.1, momentum=0.9
        )
        losses.append(float(report.loss))
    return losses


def digest(engine: Engine) -> str:
    """Of weights, moments, steps and EMA, whichever ranks hold what.

    One process counts no step of the mask token that no mask group uses; ranks count all.
    """
    whole = state(engine)
    steps = [name for name in whole["optimizer"] if name.endswith(".step")]
    count = max(float(whole["optimizer"].pop(name)) for name in steps)
    found = hashlib.sha256(str(count).encode())
    for part, tensors in sorted(whole.items()):
        for name, tensor in sorted(tensors.items()):
            found.update(f"{part} {name} {list(tensor.shape)}".encode())
            found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def without_room(saver: Saver, step: int, engine: Engine) -> str:
    """What a save comes to when the last rank may write no more than 4 KiB."""
    last = engine.ranks.rank == engine.ranks.size - 1
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if last:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, before[1]))
    try:
        save(saver, step, engine, guard(), {})
        saver.wait()
    except RanksError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return "saved"


def continue_run(launch: Launch, ranks: Ranks, folder: Path) -> dict[str, Any]:
    jepa, engine = engine_of(launch, ranks, seed=ranks.size)
    watch = guard()
    checkpoint = resume(folder, engine, watch)
    step = 0 if checkpoint is None else checkpoint.step
    found: dict[str, Any] = {**asdict(launch), "step": step, "resumed": digest(engine)}
    found["losses"] = train(jepa, engine, range(step, step + STEPS))
    step += STEPS
    saver = Saver(folder, ranks, keep=2)
    if ranks.size > 1:
        found["without_room"] = ranks.gather(without_room(saver, step, engine))
        found["left"] = sorted(p.name for p in (folder / "checkpoints").glob(".tmp-*"))
    found["saved"] = digest(engine)
    found["bytes"] = ranks.gather(num_bytes(engine.snapshot()))
    save(saver, step, engine, watch, {"launch": asdict(launch)})
    # Training goes on while the copy is written.
    train(jepa, engine, range(step, step + 1))
    saver.poll()
    saver.wait()
    found["moved"] = digest(engine)
    restore(newest_first(folder)[0], engine, watch)
    found["returned"] = digest(engine)
    return found


def meet_damage(launch: Launch, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """What every rank says when the last rank's file is altered."""
    path = newest_first(folder)[0]
    if ranks.first:
        file = max(path.glob("optimizer*"))
        content = bytearray(file.read_bytes())
        content[-3] ^= 16
        file.write_bytes(content)
    ranks.gather(None)
    _, engine = engine_of(launch, ranks, seed=0)
    before = digest(engine)
    try:
        resume(folder, engine, guard())
    except CheckpointError as error:
        return {"told": ranks.gather(str(error)), "untouched": digest(engine) == before}
    return {"told": []}


class Spoilt:
    """A source in which some batches hold an infinity; `taken` are those that were asked for."""

    def __init__(self, source: BatchSource, steps: tuple[int, ...]) -> None:
        self.source, self.steps = source, steps
        self.taken: list[int] = []

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        for batch in self.source.batches(start, stop):
            clip = normalise(batch.clip)
            if batch.step in self.steps:
                clip[0, 0, 0, 0, 0] = torch.inf
            self.taken.append(batch.step)
            yield batch._replace(clip=clip)

    def first_clip(self) -> Batch:
        return self.source.first_clip()

    def close(self) -> None:
        self.source.close()


def go_back(ranks: Ranks, place: Path) -> dict[str, Any]:
    """A run whose last rank meets two bad steps in a row."""
    recipe = place / "back.yaml"
    trainer = build(load_recipe(recipe), ranks=ranks, console=Console(StringIO()))
    steps = (5, 6) if ranks.rank == ranks.size - 1 else ()
    spoilt = Spoilt(trainer.loaders["video"], steps)
    trainer.loaders = {"video": spoilt}
    finished = trainer.run(StopRequest())
    return {
        "finished": ranks.gather(finished),
        "taken": ranks.gather(spoilt.taken),
        "returns": ranks.gather(trainer.returns.made),
        "logged": [row["step"] for row in read_metrics(trainer.folder / "metrics.jsonl")],
    }


def write_run(place: Path) -> None:
    """The recipe of `go_back`, and its clips."""
    (place / "clips").mkdir()
    for number in range(4):
        write_numbered(place / "clips", number, codec="h264")
    (place / "back.yaml").write_text(f"""
model:
  {{name: vit_tiny, width: 48, depth: 4, heads: 2,
   predictor: {{width: 48, depth: 2, heads: 2, mask_tokens: 2}}}}
data: {{video: {place / "clips"}, frames: 4, fps: 8, crop: 64, batch: 2, workers: 0}}
optim: {{lr: 1.0e-3, warmup: 2, ema: {{half_life: 5}}}}
guard: {{return_after: 2}}
train: {{steps: 10, log_every: 1, checkpoint_every: 4}}
engine: {{kind: deepspeed, device: cpu, dtype: float32, threads: 1, zero_stage: 2}}
run: {{folder: {place / "back"}}}
""")


def on_ranks(launch: Launch, work: Callable[[Ranks], dict[str, Any]]) -> dict[str, Any]:
    """The first rank's result of `work` on forked ranks."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as place:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
        free.close()
        children = []
        for rank in range(launch.size):
            child = os.fork()
            if not child:
                os.environ |= {
                    "RANK": str(rank), "WORLD_SIZE": str(launch.size), "LOCAL_RANK": str(rank),
                    "MASTER_ADDR": "localhost", "MASTER_PORT": port,
                }  # fmt: skip
                try:
                    with join(CPU, timeout=300, alone=launch.stage is not None) as ranks:
                        (Path(place) / str(rank)).write_bytes(pickle.dumps(work(ranks)))
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            sys.exit(f"{launch}: exit codes {codes}")
        found: dict[str, Any] = pickle.loads((Path(place) / "0").read_bytes())
    return found


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    _import_deepspeed(CPU)
    for late in ("torch._dynamo", "deepspeed.runtime.zero.muon.original_muon"):
        importlib.import_module(late)
    for stage in ("stage3", "stage_1_and_2"):
        importlib.import_module(f"deepspeed.runtime.zero.{stage}")
    launches = [
        on_ranks(launch, lambda ranks, one=launch: continue_run(one, ranks, folder))  # type: ignore[misc]
        for launch in LAUNCHES
    ]
    jepa, engine = engine_of(Launch(1, None), Ranks(), seed=LAUNCHES[0].size)
    straight = train(jepa, engine, range(STEPS * len(LAUNCHES)))
    two = Launch(2, 1)
    damage = on_ranks(two, lambda ranks: meet_damage(two, ranks, folder))
    write_run(out.parent)
    back = on_ranks(two, lambda ranks: go_back(ranks, out.parent))
    found = {"launches": launches, "straight": straight, "damage": damage, "back": back}
    out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
