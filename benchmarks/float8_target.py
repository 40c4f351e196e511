"""What a target encoder in float8 does to the demo run: its loss curve, and the targets themselves.

    python benchmarks/float8_target.py --steps 160 --json float8_target.json

The demo recipe is trained twice from the same seed, side by side, with the target's products in the
recipe's dtype and in float8. Losses are compared window by window: means of so many logged steps.
The targets are those of the first run's last checkpoint on its probe clip, normalised as the loss
does.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import torch
from torch.nn import functional as F

from fastjepa.build import build, encoder_sizes
from fastjepa.config.load import load_recipe
from fastjepa.config.resolve import resolve
from fastjepa.data.augment import normalise
from fastjepa.model import Encoder
from fastjepa.model.float8 import Float8Linear
from fastjepa.observe.sinks import read_metrics

RECIPE = Path(__file__).parents[1] / "configs/demo.yaml"
WINDOW = 5


def training(folder: Path, overrides: list[str]) -> subprocess.Popen[bytes]:
    words = ["-m", "fastjepa.cli", "train", str(RECIPE), f"run.folder={folder}", *overrides]
    return subprocess.Popen([sys.executable, *words], stdout=sys.stderr)


def losses(folder: Path, run: subprocess.Popen[bytes]) -> list[float]:
    """The logged losses, once the run has ended."""
    if run.wait():
        sys.exit(f"{folder.name}: training failed")
    return [float(row["loss"]) for row in read_metrics(folder / "metrics.jsonl")]


def windows(values: list[float]) -> list[float]:
    return [fmean(values[low : low + WINDOW]) for low in range(0, len(values) - WINDOW + 1, WINDOW)]


def target_errors(folder: Path, overrides: list[str]) -> dict[str, float]:
    """Relative error of each normalised level: norm of the difference over the norm."""
    recipe = load_recipe(RECIPE, [f"run.folder={folder}", *overrides])
    trainer = build(recipe)
    target, levels = trainer.jepa.target, trainer.jepa.target_levels
    rounded = Encoder(**encoder_sizes(recipe, resolve(recipe)), linear=Float8Linear)
    rounded.load_state_dict(target.state_dict())
    clip = normalise(trainer.probe_clip("video"))
    errors = {}
    with torch.no_grad():
        pairs = zip(levels, rounded(clip, levels=levels), target(clip, levels=levels), strict=True)
        for level, ours, exact in pairs:
            a, b = (F.layer_norm(x, x.shape[-1:]) for x in (ours, exact))
            errors[f"level {level}"] = float((a - b).norm() / b.norm())
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, required=True, help="where to write the figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    overrides = [
        f"train.steps={args.steps}", f"engine.threads={args.threads}", "observe.pictures=false",
        "train.log_every=1", "data.workers=0",
    ]  # fmt: skip
    with TemporaryDirectory() as folder:
        plain, float8 = Path(folder, "plain"), Path(folder, "float8")
        runs = [
            training(plain, overrides),
            training(float8, [*overrides, "engine.target_dtype=float8"]),
        ]
        exact, rounded = losses(plain, runs[0]), losses(float8, runs[1])
        errors = target_errors(plain, overrides)
    gaps = [a / b - 1 for a, b in zip(windows(rounded), windows(exact), strict=True)]
    found = {
        "steps": args.steps, "window": WINDOW, "loss_plain": exact, "loss_float8": rounded,
        "relative_differences": gaps, "largest_relative_difference": max(map(abs, gaps)),
        "target_errors": errors, "torch": torch.__version__,
    }  # fmt: skip
    print(f"largest difference of a window's loss: {found['largest_relative_difference']:.3%}")
    for level, error in errors.items():
        print(f"targets, {level}: {error:.3%}")
    args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
