"""What each part of the objective is worth: four objectives, three seeds, one budget, digits.

    python benchmarks/objective_ablation.py WORK --out benchmarks/results/MACHINE

V-JEPA 2; + dense (context tokens are supervised); + dense + deep (at four levels); + dense + deep +
images (every other step is a batch of pictures, as many tokens as a batch of clips). The models are
trained by recipes like any other on video files in WORK, which takes the most of the time; a run
that was stopped goes on when the command is given again. Probes on frozen features of the target
encoder: see objective_probes.py. Writes objective-ablation.json, .md (tables) and .png.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from objective_probes import DRAWS, Part, make_parts, measure
from objective_report import as_markdown, draw
from PIL import Image

from fastjepa.bench.machine import commit, device_facts, versions
from fastjepa.build import build
from fastjepa.checkpoint.layout import CHECKPOINTS
from fastjepa.config.schema import Recipe
from fastjepa.data.moving_digits import MovingDigits
from fastjepa.data.write_digits import MANIFEST, write_digits
from fastjepa.durable import write_text
from fastjepa.observe.console import Console
from fastjepa.pretrained import load
from fastjepa.train.signals import stop_on_signals

SIZE, FRAMES, FPS, BATCH = 48, 4, 8.0, 12
PATCH, TUBELET, DIGIT = 8, 2, 24  # pixels, frames, pixels
# Shares of the steps after which features are probed, as they are before the first.
CURVE = (0.0625, 0.125, 0.25, 0.5, 1.0)


class Arm(NamedTuple):
    """An objective: the recipe's `objective.dense` and `deep`, and the images' share of steps."""

    dense: bool
    deep: bool
    image_share: float


OBJECTIVES = {
    "V-JEPA 2": Arm(False, False, 0.0),
    "+ dense": Arm(True, False, 0.0),
    "+ dense + deep": Arm(True, True, 0.0),
    "+ dense + deep + images": Arm(True, True, 0.5),
}
FIRST = next(iter(OBJECTIVES))
# A run sees each about twice. None of their seeds is a probe's.
VIDEOS, IMAGES = 1800, 3600


def recipe(objective: str, seed: int, work: Path, steps: int) -> Recipe:
    """The run's recipe: everything but the objective and the seed is the same for all."""
    arm = OBJECTIVES[objective]
    return Recipe.model_validate(
        {
            "run": {"folder": work / "runs" / f"{_slug(objective)}-seed{seed}", "seed": seed},
            "model": {
                "name": "vit_tiny", "width": 96, "depth": 4, "heads": 3, "patch": PATCH,
                "predictor": {"width": 64, "depth": 2, "heads": 2},
            },
            "data": {
                "video": str(work / "videos" / MANIFEST),
                "image": str(work / "images") if arm.image_share else (),
                "image_share": arm.image_share, "mix": "alternate",
                "frames": FRAMES, "fps": FPS, "crop": SIZE, "batch": BATCH,
                # As many tokens as the clips: a picture has one of their two time steps.
                "image_batch": BATCH * FRAMES // 2,
                "workers": 0,
                "augment": {"scale": (0.5, 1.0), "flip": 0.0},
            },
            "objective": {
                "dense": arm.dense, "deep": arm.deep,
                # The released shares of 135,000 steps, as the warmup and the half-life are.
                "ramp": {"start": "11.1%", "end": "22.2%"},
            },
            "optim": {
                "start_lr": 1e-4, "lr": 1e-3, "warmup": "8.9%", "ema": {"half_life": "0.7%"},
            },
            "train": {
                "steps": steps, "checkpoint_every": int(steps * CURVE[0]), "keep_checkpoints": 20,
                "log_every": 20,
            },
            "engine": {"device": "auto", "dtype": "float32"},
            "observe": {"pictures": False},
        }
    )  # fmt: skip


def _digits(frames: int) -> MovingDigits:
    return MovingDigits(frames=frames, height=SIZE, width=SIZE, fps=FPS, digit_size=DIGIT)


def write_data(work: Path) -> None:
    """The training clips as video files and pictures from other clips, unless they are there."""
    source = _digits(6)
    if not (work / "videos" / MANIFEST).exists():
        for _ in write_digits(work / "videos", source, VIDEOS):
            pass
    folder = work / "images"
    folder.mkdir(parents=True, exist_ok=True)
    still = replace(_digits(1), seed=1)
    for number in range(len(list(folder.glob("*.png"))), IMAGES):
        Image.fromarray(still[number].frames[0]).save(folder / f"{number:05d}.png")


def run(objective: str, seed: int, work: Path, steps: int, parts: Mapping[str, Part]) -> bool:
    """Train one model and probe it along its way; False if a signal asked to stop."""
    chosen = recipe(objective, seed, work, steps)
    file = chosen.run.folder / "probes.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    with stop_on_signals() as stop:
        if str(steps) not in found:
            trainer = build(chosen, Console())
            # Encoders of one seed start alike, whatever the objective.
            if objective == FIRST and "0" not in found:
                found["0"] = measure(trainer.jepa.target.eval(), parts, images=False)
                write_text(file, json.dumps(found))
            if trainer.step < steps and not trainer.run(stop):
                return False
        for step in (int(steps * share) for share in CURVE):
            if str(step) in found:
                continue
            encoder = load(chosen.run.folder / CHECKPOINTS / f"step-{step:08d}")
            found[str(step)] = measure(
                encoder, parts, images=OBJECTIVES[objective].image_share > 0.0
            )
            write_text(file, json.dumps(found))
            if stop.name:
                return False
    return True


def results(work: Path, steps: int, seeds: list[int]) -> dict[str, Any]:
    """What all finished runs measured: by objective, by seed, by step."""
    one = recipe("V-JEPA 2", 0, work, steps)
    runs: dict[str, dict[str, Any]] = {}
    for objective in OBJECTIVES:
        for seed in seeds:
            folder = recipe(objective, seed, work, steps).run.folder
            file = folder / "probes.json"
            found = json.loads(file.read_text()) if file.exists() else {}
            if str(steps) in found:
                start = {"0": runs[FIRST][str(seed)]["0"]} if objective != FIRST else {}
                runs.setdefault(objective, {})[str(seed)] = start | found
    return {
        "command": f"python benchmarks/objective_ablation.py WORK --steps {steps}",
        "machine": device_facts(torch.device("cpu")),
        "versions": versions("torch", "scikit-learn"),
        "commit": commit(),
        "recipe": {
            key: value
            for key, value in one.model_dump(mode="json").items()
            if key in ("model", "optim", "objective", "masks")
        },
        "clips_per_step": BATCH,
        "steps": steps,
        "videos": VIDEOS,
        "probe_samples": {name: draw.clips for name, draw in DRAWS.items()},
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="folder for data and runs")
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--steps", type=int, default=1280, help="a multiple of 16")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="others can run beside these"
    )
    args = parser.parse_args()
    write_data(args.work)
    parts = make_parts(_digits(FRAMES), PATCH, TUBELET, args.work / "probes.pt")
    finished = all(
        run(objective, seed, args.work, args.steps, parts)
        for seed in args.seeds
        for objective in OBJECTIVES
    )
    found = results(args.work, args.steps, args.seeds)
    if not finished:
        print("stopped; the same command goes on")
    print(as_markdown(found))
    if args.out is not None and found["runs"]:
        write_text(args.out / "objective-ablation.json", json.dumps(found, indent=1) + "\n")
        write_text(args.out / "objective-ablation.md", as_markdown(found))
        draw(found, args.out / "objective-ablation.png")


def _slug(objective: str) -> str:
    return "-".join(part for part in objective.lower().replace("+", " ").split())


if __name__ == "__main__":
    main()
