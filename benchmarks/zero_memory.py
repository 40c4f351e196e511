"""Bytes of a rank's states under ZeRO, by kind, measured from the tensors that live.

    python benchmarks/zero_memory.py --json zero_memory.json

Each number of ranks and stage runs two steps of a small clip in fresh processes over gloo. Live
tensors are counted (each storage once, from the garbage collector) at three moments of the second
step: when the last gradient has come (the height of forward and backward, activations gone), when
the reduction is over, and as AdamW takes a group. What every process holds before there is an
engine is taken off, and so are communication buckets. Kinds are the engine's own list; `rest` is
what lives beside them. The bar is issue-given, in bytes a parameter for R ranks, plus 10 %: the
encoder 6 + 16/R (stage 1), 4 + 18/R (2), 22/R and a gathered block (3); the predictor, which has
no target and no EMA, 6 less. The official code holds 20 a parameter on every rank.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastjepa.masking.batch import MaskMaker
from fastjepa.masking.blocks import Blocks
from fastjepa.model import Predictor, build_encoder
from fastjepa.model.block import Block
from fastjepa.objective.dense_loss import Objective
from fastjepa.presets import PRESETS
from fastjepa.train.engine_deepspeed import DeepSpeedEngine
from fastjepa.train.guard import LossGuard
from fastjepa.train.ranks import Ranks, join
from fastjepa.train.step import Jepa, MicroBatch, train_step

CPU = torch.device("cpu")
SIDE, FRAMES, MODEL = 64, 4, "vit_small"


def storages() -> dict[int, int]:
    """Bytes of every live tensor's memory by its address."""
    gc.collect()
    found: dict[int, int] = {}
    tensors = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and not t.is_meta]
    # A gradient that nobody has asked for is no Python object yet.
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    for tensor in tensors:
        memory = tensor.untyped_storage()
        found[memory.data_ptr()] = memory.nbytes()
    found.pop(0, None)
    return found


def buckets(optimizer: Any) -> set[int]:
    """Addresses of the buffers in which gradients travel."""
    held = [getattr(bucket, "buffer", None) for bucket in optimizer.ipg_buckets.values()]
    tensors = [t for buffer in held for t in (buffer if isinstance(buffer, list) else [buffer])]
    return {t.untyped_storage().data_ptr() for t in tensors if t is not None}


class Heights:
    """Live bytes at named moments, communication buckets and what was there before apart."""

    def __init__(self) -> None:
        self.before = set(storages())
        self.seen: dict[str, int] = {}

    def take(self, name: str, engine: DeepSpeedEngine, batch: MicroBatch) -> None:
        apart = self.before | buckets(engine._layout.optimizer)
        apart |= {t.untyped_storage().data_ptr() for t in (batch.clip,)}
        live = sum(size for address, size in storages().items() if address not in apart)
        self.seen[name] = max(self.seen.get(name, 0), live)


def networks() -> Jepa:
    levels = PRESETS[MODEL].levels
    encoder, target = build_encoder(MODEL), build_encoder(MODEL)
    predictor = Predictor(
        encoder_width=encoder.width, num_levels=len(levels), width=192, depth=2, heads=6
    )
    return Jepa(
        encoder, predictor, target, Objective((1 / len(levels),) * len(levels)), levels, levels
    )


def measure(ranks: Ranks, stage: int) -> dict[str, Any]:
    torch.manual_seed(0)
    grid = (FRAMES // 2, SIDE // 16, SIDE // 16)
    maker = MaskMaker((Blocks(2, (0.3, 0.3)),), grid, 1, seed=0, rank=ranks.rank)
    batch = MicroBatch(torch.randn(1, 3, FRAMES, SIDE, SIDE), maker(0), 1.0, 0.5)
    heights = Heights()
    jepa = networks()
    sizes = [
        sum(p.numel() for p in network.parameters()) for network in (jepa.encoder, jepa.predictor)
    ]
    block = sum(
        p.numel() for m in jepa.encoder.modules() if isinstance(m, Block) for p in m.parameters()
    )
    engine = DeepSpeedEngine(
        encoder=jepa.encoder, predictor=jepa.predictor, target=jepa.target, ranks=ranks,
        device=CPU, stage=stage,
    )  # fmt: skip
    guard = LossGuard(sigma=None, window=4, start=0, device=CPU)

    def step(number: int) -> None:
        train_step(
            jepa, engine, guard, [batch], step=number, lr=1e-4, weight_decay=0.04, momentum=0.999
        )

    step(0)
    reduce, adamw = engine._engine.allreduce_gradients, engine._layout.client.step

    def before_reduction(*args: Any, **kwargs: Any) -> Any:
        heights.take("all gradients", engine, batch)
        return reduce(*args, **kwargs)

    def before_adamw(*args: Any, **kwargs: Any) -> Any:
        heights.take("in AdamW", engine, batch)
        return adamw(*args, **kwargs)

    engine._engine.allreduce_gradients = before_reduction
    engine._layout.client.step = before_adamw  # type: ignore[method-assign]
    after_backward = engine.grad_norm
    kinds: dict[str, int] = {}

    def reduced() -> Tensor:
        heights.take("reduced", engine, batch)
        kinds.update(engine.shards.bytes())
        return after_backward()

    engine.grad_norm = reduced  # type: ignore[method-assign]
    step(1)
    size = ranks.size
    per_parameter = {1: 6 + 16 / size, 2: 4 + 18 / size, 3: 22 / size}[stage]
    predictor_too = {1: 4 + 12 / size, 2: 2 + 14 / size, 3: 16 / size}[stage]
    bar = 1.1 * (per_parameter * sizes[0] + predictor_too * sizes[1])
    if stage == 3:
        bar += 2 * block / PRESETS[MODEL].depth
    found = {
        "encoder_parameters": sizes[0], "predictor_parameters": sizes[1], "kinds": kinds,
        "live": heights.seen, "bar": round(bar), "official": 20 * sizes[0] + 16 * sizes[1],
    }  # fmt: skip
    return max(ranks.gather(found), key=lambda one: one["live"]["all gradients"])


def work(stage: int, out: Path) -> None:
    """One rank's part."""
    torch.set_num_threads(1)
    with join(CPU, timeout=600, alone=True) as ranks:
        found = measure(ranks, stage)
        if ranks.first:
            out.write_text(json.dumps(found))


def launch(ranks: int, stage: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        subprocess.run(
            [*run, str(ranks), __file__, "--work", str(stage), "--out", str(out)], check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        found: dict[str, Any] = json.loads(out.read_text())
    return {"ranks": ranks, "stage": stage} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--work", type=int, metavar="STAGE", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work is not None:
        work(arguments.work, arguments.out)
        return
    runs = []
    for stage in (1, 2, 3):
        for ranks in (1, 2, 4):
            run = launch(ranks, stage)
            runs.append(run)
            total = run["encoder_parameters"] + run["predictor_parameters"]
            live = {name: f"{size / total:.2f}" for name, size in run["live"].items()}
            print(
                f"stage {stage}, {ranks} ranks: bytes a parameter {live}, bar "
                f"{run['bar'] / total:.2f}, official {run['official'] / total:.2f}",
                flush=True,
            )
    if arguments.json:
        facts = {"model": MODEL, "torch": torch.__version__, "runs": runs}
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
