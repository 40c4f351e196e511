"""What gathering the target's working weights adds to a step: two ranks, steps with and without.

    python benchmarks/ema_gather.py --json ema_gather.json

After each step at ZeRO stages 1 and 2 a rank casts its EMA shard and an all-gather of the target's
weights starts, which the next target forward waits for. Here every other pair of steps leaves the
gather out (its result does not change the cost of a step), in one run, so that the machine's other
load meets both. `added` is the median over pairs of (with - without) / without. `told` is the time
the ranks themselves spend in starting and in waiting, over that of a step: what is not hidden. The
bar is 3 %.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from fastjepa.bench.machine import device_facts
from fastjepa.masking.batch import MaskMaker
from fastjepa.masking.blocks import Blocks
from fastjepa.model import Predictor, build_encoder
from fastjepa.objective.dense_loss import Objective
from fastjepa.presets import PRESETS
from fastjepa.train.engine_deepspeed import DeepSpeedEngine
from fastjepa.train.guard import LossGuard
from fastjepa.train.ranks import Ranks, join
from fastjepa.train.step import Jepa, MicroBatch, train_step
from fastjepa.train.zero_layout import Ema, Targets

CPU = torch.device("cpu")
GROUPS = (Blocks(8, (0.15, 0.15)), Blocks(2, (0.7, 0.7)))  # the released ones of videos


def networks(model: str) -> Jepa:
    torch.manual_seed(0)
    levels = PRESETS[model].levels
    encoder, target = build_encoder(model), build_encoder(model)
    predictor = Predictor(
        encoder_width=encoder.width, num_levels=len(levels), width=384, depth=4, heads=12
    )
    weights = (1 / len(levels),) * len(levels)
    return Jepa(encoder, predictor, target, Objective(weights), levels, levels)


class Gather:
    """The engine's gather, that can be left out, with the seconds that it takes from a rank."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        layout = engine._layout
        self._publish, self._wait = layout.publish, layout.wait
        self.on, self.seconds = True, 0.0
        layout.publish, layout.wait = self.publish, self.wait  # type: ignore[method-assign]

    def publish(self, targets: Targets, ema: Ema) -> None:
        if self.on:
            started = time.perf_counter()
            self._publish(targets, ema)
            self.seconds += time.perf_counter() - started

    def wait(self) -> None:
        started = time.perf_counter()
        self._wait()
        self.seconds += time.perf_counter() - started


def measure(ranks: Ranks, arguments: argparse.Namespace) -> dict[str, Any]:
    jepa = networks(arguments.model)
    frames, size = arguments.frames, arguments.size
    maker = MaskMaker(GROUPS, (frames // 2, size // 16, size // 16), 1, seed=0, rank=ranks.rank)
    batch = MicroBatch(torch.randn(1, 3, frames, size, size), maker(0), 1.0, 0.5)
    engine = DeepSpeedEngine(
        encoder=jepa.encoder, predictor=jepa.predictor, target=jepa.target, ranks=ranks,
        device=CPU, stage=2, dtype=torch.float32,
    )  # fmt: skip
    guard, gather = LossGuard(sigma=None, window=4, start=0, device=CPU), Gather(engine)

    def step(*, on: bool) -> tuple[float, float]:
        """Seconds of a step whose gather was started at the end of the one before."""
        gather.on, gather.seconds = on, 0.0
        dist.barrier()
        started = time.perf_counter()
        train_step(jepa, engine, guard, [batch], step=0, lr=1e-4, weight_decay=0.04, momentum=0.999)
        return time.perf_counter() - started, gather.seconds

    step(on=True)
    turns: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for pair in range(arguments.pairs):
        for on in (True, False) if pair % 2 else (False, True):
            step(on=on)  # starts, or leaves out, what the next step waits for
            turns[on].append(step(on=on))
    told = ranks.gather(turns)
    # The slower rank makes the step.
    seconds = {
        on: [max(one[on][pair][0] for one in told) for pair in range(arguments.pairs)]
        for on in (True, False)
    }
    own = [max(one[True][pair][1] for one in told) for pair in range(arguments.pairs)]
    added = [w / without - 1.0 for w, without in zip(seconds[True], seconds[False], strict=True)]
    shares = [spent / whole for spent, whole in zip(own, seconds[True], strict=True)]
    return {
        "encoder_parameters": sum(p.numel() for p in jepa.encoder.parameters()),
        "bytes_gathered": 4 * sum(p.numel() for p in jepa.encoder.parameters()),
        "seconds_with": seconds[True], "seconds_without": seconds[False],
        "added": statistics.median(added), "added_by_pair": added,
        "told": statistics.median(shares), "told_by_pair": shares,
    }  # fmt: skip


def work(arguments: argparse.Namespace) -> None:
    """One rank's part."""
    torch.set_num_threads(1)
    with join(CPU, timeout=600, alone=True) as ranks:
        found = measure(ranks, arguments)
        if ranks.first:
            arguments.out.write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_small")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.out is not None:
        work(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        subprocess.run(
            [*run, __file__, *sys.argv[1:], "--out", str(out)], check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        found = json.loads(out.read_text())
    print(
        f"the gather adds {found['added']:+.1%} to a step (median of {arguments.pairs} pairs); "
        f"starting it and waiting for it take {found['told']:.1%}"
    )
    if arguments.json:
        facts = {
            "model": arguments.model, "size": arguments.size, "frames": arguments.frames,
            "ranks": 2, "stage": 2, "dtype": "float32", "torch": torch.__version__,
            "device": device_facts(CPU) | {"threads": 1},
        }  # fmt: skip
        arguments.json.write_text(json.dumps(facts | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
