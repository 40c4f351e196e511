"""What a target encoder in float8 does to the demo run: its loss curve, and the targets themselves.

    python benchmarks/float8_target.py engine.dtype=bfloat16 --steps 60 --json float8_target.json

The demo recipe, with these overrides, is trained three times from one seed: as it is, with the
target's products in float8, and as a control with another attention of the same dtype, which
differs by rounding only. Losses are compared window by window: means of so many logged steps. Where
the control's differ as much as float8's, the curve cannot tell. The targets are those of the first
run's last checkpoint on its probe clip, normalised as the loss does.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import torch
from torch.nn import functional as F

from fastjepa.build import build
from fastjepa.config.load import load_recipe
from fastjepa.config.resolve import resolve
from fastjepa.data.augment import normalise
from fastjepa.model import Encoder
from fastjepa.model.float8 import Float8Linear
from fastjepa.observe.sinks import read_metrics
from fastjepa.recipe_parts import encoder_sizes

RECIPE = Path(__file__).parents[1] / "configs/demo.yaml"
WINDOW = 5
RUNS = {
    "plain": [],
    "float8": ["engine.target_dtype=float8"],
    "control": ["model.attention=math"],
}


def losses(folder: Path, overrides: list[str]) -> list[float]:
    """The logged losses of a run of the recipe."""
    words = ["-m", "fastjepa.cli", "train", str(RECIPE), f"run.folder={folder}", *overrides]
    if subprocess.run([sys.executable, *words], stdout=sys.stderr).returncode:
        sys.exit(f"{folder.name}: training failed")
    return [float(row["loss"]) for row in read_metrics(folder / "metrics.jsonl")]


def windows(values: list[float]) -> list[float]:
    return [fmean(values[low : low + WINDOW]) for low in range(0, len(values) - WINDOW + 1, WINDOW)]


def gaps(changed: list[float], plain: list[float]) -> list[float]:
    """Relative differences of the windows' means."""
    return [a / b - 1 for a, b in zip(windows(changed), windows(plain), strict=True)]


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
    parser.add_argument("overrides", nargs="*", help="of the recipe, for every run")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=2, help="runs beside one another")
    parser.add_argument("--json", type=Path, required=True, help="where to write the figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    overrides = [
        f"train.steps={args.steps}", f"engine.threads={args.threads}", "observe.pictures=false",
        "train.log_every=1", "data.workers=0", *args.overrides,
    ]  # fmt: skip
    with TemporaryDirectory() as place, ThreadPoolExecutor(args.at_once) as pool:
        runs = {
            name: pool.submit(losses, Path(place, name), [*overrides, *own])
            for name, own in RUNS.items()
        }
        logged = {name: run.result() for name, run in runs.items()}
        errors = target_errors(Path(place, "plain"), overrides)
    plain = logged["plain"]
    differences = {name: gaps(other, plain) for name, other in logged.items() if other is not plain}
    largest = {name: max(map(abs, each)) for name, each in differences.items()}
    found = {
        "overrides": args.overrides, "steps": args.steps, "window": WINDOW, "losses": logged,
        "relative_differences": differences, "largest_relative_difference": largest,
        "target_errors": errors, "torch": torch.__version__,
    }  # fmt: skip
    for name, difference in largest.items():
        print(f"{name}: largest difference of a window's loss {difference:.3%}")
    for level, error in errors.items():
        print(f"targets, {level}: {error:.3%}")
    args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
