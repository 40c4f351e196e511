"""A whole training step of ours against the official one, in turn in one process: ratio of time
and of memory.

    python benchmarks/step_vs_reference.py --reference PATH/TO/vjepa2 --model vit_small --size 256
    --json out.json

Both sides start from the same weights and run the same steps on the same clip and masks: target,
context, predictor, distance weights, loss, backward, AdamW, EMA. Drawing the masks is the data
workers' business on both sides and not timed. Time: the two sides in turn, `--repeats` pairs after
a warm-up, the median of the pairs' ratios. Memory: each side alone in a fresh process, the peak of
all live tensors (weights, moments, EMA, clip, activations, gradients) over four steps, from
PyTorch's own record of its allocations; what libraries hold beside them is not counted. `--dtype`
is ours; on a CPU the official code has no reduced precision (its autocast is CUDA's), so there it
runs in float32 unless `--reference-dtype` says otherwise.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from official import OfficialStep
from torch import Tensor

from fastjepa.bench.memory import peak_extra
from fastjepa.bench.shapes import VIDEO_GROUPS
from fastjepa.masking.batch import MaskMaker, Masks, distance_weights
from fastjepa.model import Predictor, build_encoder
from fastjepa.objective.dense_loss import Objective
from fastjepa.presets import PRESETS
from fastjepa.train.engine import TorchEngine
from fastjepa.train.guard import LossGuard
from fastjepa.train.step import Jepa, MicroBatch, train_step

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
LR, MOMENTUM, LAMBDA = 1e-4, 0.99925, 0.5


class OurStep:
    """Our training step behind the same call as the official one's."""

    def __init__(
        self, *, model: str, pred_depth: int, dtype: torch.dtype, grid: tuple[int, int, int]
    ) -> None:
        torch.manual_seed(0)
        self.encoder = build_encoder(model)
        levels = PRESETS[model].levels
        self.predictor = Predictor(
            encoder_width=self.encoder.width, num_levels=len(levels), depth=pred_depth,
            num_mask_tokens=2,
        )  # fmt: skip
        target = build_encoder(model)
        target.load_state_dict(self.encoder.state_dict())
        objective = Objective((1 / len(levels),) * len(levels))
        self.jepa = Jepa(self.encoder, self.predictor, target, objective, levels, levels)
        self.engine = TorchEngine(
            encoder=self.encoder, predictor=self.predictor, target=target, dtype=dtype
        )
        self.guard = LossGuard(sigma=None, window=300, start=0, device=torch.device("cpu"))
        self.grid = grid

    def __call__(self, clip: Tensor, masks: Masks) -> float:
        """One step; distance weights are made in it, as theirs are."""
        pairs = zip(masks.context, masks.predict, strict=True)
        weights = tuple(distance_weights(c, p, self.grid) for c, p in pairs)
        report = train_step(
            self.jepa, self.engine, self.guard,
            [MicroBatch(clip, replace(masks, weights=weights), 1.0, LAMBDA)],
            step=0, lr=LR, weight_decay=0.04, momentum=MOMENTUM,
        )  # fmt: skip
        return float(report.loss)


def mask_maker(args: argparse.Namespace) -> MaskMaker:
    """The masks of a step are those of seed 0, the same for both sides."""
    grid = (args.frames // 2, args.size // 16, args.size // 16)
    return MaskMaker(VIDEO_GROUPS, grid, args.batch, seed=0, weigh=False)


def build(args: argparse.Namespace, side: str) -> Callable[[Masks], float]:
    """`step(masks) -> loss` of one side, on its copy of the same clip."""
    torch.manual_seed(1)
    clip = torch.randn(args.batch, 3, args.frames, args.size, args.size)
    grid = mask_maker(args).grid
    ours = OurStep(
        model=args.model, pred_depth=args.pred_depth, dtype=DTYPES[args.dtype], grid=grid
    )
    if side == "ours":
        return partial(ours, clip)
    official = OfficialStep(
        args.reference, model=args.model, size=args.size, frames=args.frames,
        pred_depth=args.pred_depth, dtype=DTYPES[args.reference_dtype],
    )  # fmt: skip
    official.load(ours.encoder.state_dict(), ours.predictor.state_dict())
    return lambda masks: official(
        clip, masks.context, masks.predict, lr=LR, context_weight=LAMBDA, momentum=MOMENTUM
    )


def peak_memory(args: argparse.Namespace, side: str) -> int:
    """Bytes of one side's live tensors at their peak, measured in a fresh process."""
    command = [sys.executable, __file__, *args.argv, "--memory-of", side]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"memory of {side}: {done.stderr.strip().splitlines()[-1]}")
    return int(done.stdout.split()[-1])


def peak_of_tensors(args: argparse.Namespace, side: str) -> int:
    """Largest sum of live allocations while one side is built and makes four steps."""
    maker = mask_maker(args)

    def four_steps() -> None:
        step = build(args, side)
        for number in range(4):
            step(maker(number))

    return peak_extra(four_steps, torch.device("cpu"))


def parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--reference", type=Path, required=True, help="an official V-JEPA 2 checkout"
    )
    parser.add_argument("--model", choices=sorted(PRESETS), default="vit_small")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--pred-depth", type=int, default=12)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="ours")
    parser.add_argument("--reference-dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--memory-of", choices=["ours", "reference"], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.argv = argv
    return args


def main(argv: list[str]) -> None:
    args = parsed(argv)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(peak_of_tensors(args, args.memory_of))
        return

    memory = {side: peak_memory(args, side) for side in ("ours", "reference")}
    maker = mask_maker(args)
    sides = {side: build(args, side) for side in ("ours", "reference")}
    times: dict[str, list[float]] = {side: [] for side in sides}
    losses: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(args.repeats + 1):
        masks = maker(number)
        for side, step in sides.items():
            start = time.perf_counter()
            losses[side].append(step(masks))
            if number:
                times[side].append(time.perf_counter() - start)

    ratios = [a / b for a, b in zip(times["ours"], times["reference"], strict=True)]
    differences = [
        abs(a - b) / abs(b) for a, b in zip(losses["ours"], losses["reference"], strict=True)
    ]
    figures: dict[str, Any] = {
        "time_ratio": statistics.median(ratios),
        "memory_ratio": memory["ours"] / memory["reference"],
        "loss_relative_difference": max(differences),
        "time_ratios": ratios,
        "seconds": {side: statistics.median(values) for side, values in times.items()},
        "peak_bytes": memory,
        "losses": losses,
        "settings": {
            key: str(value) if isinstance(value, Path) else value
            for key, value in vars(args).items()
            if key not in ("argv", "reference", "json", "memory_of")
        },
        "torch": torch.__version__,
    }
    print(f"{'':12}{'ours':>12}{'reference':>12}{'ratio':>8}")
    print(
        f"{'step, s':12}{figures['seconds']['ours']:12.3f}{figures['seconds']['reference']:12.3f}"
        f"{figures['time_ratio']:8.3f}"
    )
    mib = {side: value / 2**20 for side, value in memory.items()}
    print(
        f"{'peak, MiB':12}{mib['ours']:12.0f}{mib['reference']:12.0f}{figures['memory_ratio']:8.3f}"
    )
    print(f"loss: largest relative difference {figures['loss_relative_difference']:.2e}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
