"""Where a run may start from: the weights of another, its optimizer too, or its average alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastjepa.build import build
from fastjepa.checkpoint import latest_checkpoint, load_checkpoint
from fastjepa.config.load import load_recipe
from fastjepa.convert import convert
from fastjepa.train.signals import StopRequest

Write = Callable[..., Path]


@pytest.fixture
def pretrained(write_recipe: Write, tmp_path: Path) -> Path:
    """The folder of a run of four steps."""
    assert build(load_recipe(write_recipe("pretrained"), ["train.steps=4"])).run(StopRequest())
    return tmp_path / "pretrained"


def state(folder: Path) -> dict[str, dict[str, Tensor]]:
    path = latest_checkpoint(folder)
    assert path is not None
    return {part: dict(tensors) for part, tensors in load_checkpoint(path).tensors.items()}


def started(write_recipe: Write, changes: list[str]) -> dict[str, dict[str, Tensor]]:
    """The state of a run that has made no step."""
    shares = build(load_recipe(write_recipe("next"), changes)).engine.snapshot()
    return {
        part: {name: piece.data for name, piece in pieces.items()}
        for part, pieces in shares.items()
    }


def same(found: object, wanted: dict[str, Tensor]) -> bool:
    assert isinstance(found, dict)
    return found.keys() == wanted.keys() and all(
        torch.equal(found[n], t) for n, t in wanted.items()
    )


@pytest.mark.parametrize("start", ["weights", "optimizer", "average"])
def test_what_init_with_takes(write_recipe: Write, pretrained: Path, start: str) -> None:
    changes = [f"train.init_from={pretrained}", f"train.init_with={start}", "run.seed=5"]
    found, wanted = started(write_recipe, changes), state(pretrained)
    average = wanted["target_encoder"]
    assert same(found["predictor"], wanted["predictor"])
    assert same(found["target_encoder"], average)
    assert same(found["encoder"], average if start == "average" else wanted["encoder"])
    assert same(found["optimizer"], wanted["optimizer"]) == (start == "optimizer")


def test_an_exported_file_gives_its_predictor_too(
    write_recipe: Write, pretrained: Path, tmp_path: Path
) -> None:
    exported = tmp_path / "exported.safetensors"
    convert(pretrained, "safetensors", exported)
    changes = [f"train.init_from={exported}", "run.seed=5"]
    found, wanted = started(write_recipe, changes), state(pretrained)
    assert same(found["encoder"], wanted["target_encoder"])
    assert same(found["predictor"], wanted["predictor"])


def test_moments_are_in_our_checkpoints_alone(
    write_recipe: Write, pretrained: Path, tmp_path: Path
) -> None:
    exported = tmp_path / "official.pt"
    convert(pretrained, "official", exported)
    changes = [f"train.init_from={exported}", "train.init_with=optimizer"]
    with pytest.raises(ValueError, match="no moments"):
        build(load_recipe(write_recipe("next"), changes))


def test_a_cooldown_goes_on_with_longer_clips_of_another_size(
    write_recipe: Write, pretrained: Path
) -> None:
    """Weights know no resolution and no length: 4 frames of 64 pixels, then 8 of 96."""
    changes = [
        f"train.init_from={pretrained}", "train.init_with=optimizer", "train.steps=2",
        "data.frames=8", "data.crop=96", "data.image_crop=80",
        "objective.ramp=null", "objective.distance_weights=false",
        "optim.schedule=linear", "optim.warmup=0", "optim.final_lr=1e-6",
    ]  # fmt: skip
    trainer = build(load_recipe(write_recipe("cooldown"), changes))
    assert [trainer.plan.lr(step) for step in range(2)] == pytest.approx([5.005e-4, 1e-6])
    assert trainer.plan.context_weight(0, "video") == 0.5
    assert trainer.run(StopRequest())
