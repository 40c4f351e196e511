"""Stopping and going on: a run cut anywhere ends with the weights of one that was not."""

import json
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastjepa.checkpoint import latest_checkpoint

from ..processes import finish, wait_for_checkpoint, wait_for_step
from .conftest import run, start, write_tiny

Write = Callable[..., Path]
Straight = Callable[..., Path]
# Of every run; a checkpoint is due every 5.
STEPS = 20
STEPS_KEY = f"train.steps={STEPS}"


def weights(folder: Path, step: int) -> dict[str, Tensor]:
    place = folder / "checkpoints" / f"step-{step:08}"
    parts = ("encoder", "predictor", "target_encoder", "optimizer", "guard")
    return {
        f"{part}/{name}": tensor
        for part in parts
        for name, tensor in load_file(place / f"{part}.safetensors").items()
    }


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit; the guard's unused places hold NaN on both sides."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name].nan_to_num(-1.0), b[name].nan_to_num(-1.0)), name


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """The folder of a run that nothing stops, in one process, made once for the same settings."""

    @cache
    def made(**settings: object) -> Path:
        recipe = write_tiny(tmp_path_factory.mktemp("straight"), **settings)
        code, out = run(recipe, STEPS_KEY)
        assert code == 0, out
        return recipe.with_suffix("")

    return lambda **settings: made(**(settings | {"workers": 0}))


@pytest.mark.parametrize(
    "settings",
    [
        {"mix": "accumulate", "workers": 1},
        {"mix": "alternate", "workers": 0, "accumulate": 2, "dtype": "bfloat16"},
        {"mix": "accumulate", "workers": 0, "lengths": "[{frames: 8, batch: 1, share: 0.4}]"},
        {
            "mix": "alternate",
            "workers": 0,
            "lengths": "[{frames: 8, batch: 1, share: 0.3}, {frames: 2, batch: 3, share: 0.3}]",
        },
    ],
)
def test_killed_run_ends_bit_identical(
    write_recipe: Write, straight: Straight, settings: dict[str, object]
) -> None:
    cut = write_recipe("cut", **settings)
    process = start(cut, STEPS_KEY)
    wait_for_step(cut.with_suffix(""), 7, process)
    wait_for_checkpoint(cut.with_suffix(""), process)
    process.send_signal(signal.SIGKILL)
    finish(process)
    code, out = run(cut, STEPS_KEY)
    assert code == 0
    assert "resumed from" in out
    assert_same(weights(straight(**settings), STEPS), weights(cut.with_suffix(""), STEPS))
    steps = [
        json.loads(line)["step"]
        for line in (cut.with_suffix("") / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(1, STEPS + 1))


@pytest.mark.parametrize(("name", "workers"), [("SIGTERM", 1), ("SIGINT", 0)])
def test_signal_saves_and_says_how_to_go_on(
    write_recipe: Write, straight: Straight, name: str, workers: int
) -> None:
    recipe = write_recipe("run", workers=workers)
    process = start(recipe, STEPS_KEY)
    wait_for_step(recipe.with_suffix(""), 3, process)
    process.send_signal(getattr(signal, name))
    code, out = finish(process)
    assert code == 0
    assert f"stopped by {name}" in out
    assert f"train {recipe}" in out.split("to go on: ")[1]
    saved = latest_checkpoint(recipe.with_suffix(""))
    assert saved is not None
    code, out = run(recipe, STEPS_KEY, "data.workers=0")
    assert code == 0
    assert_same(weights(straight(), STEPS), weights(recipe.with_suffix(""), STEPS))


def test_finished_run_says_so(write_recipe: Write) -> None:
    recipe = write_recipe("run")
    assert run(recipe, "train.steps=2")[0] == 0
    code, out = run(recipe, "train.steps=2")
    assert code == 0
    assert "holds all 2 steps" in out
    code, out = run(recipe, "train.steps=4", "optim.accumulate=2")
    assert code == 2
    assert "a step took 2 samples of video and would take 4" in out
    assert run(recipe, "train.steps=4")[0] == 0
    folder = recipe.with_suffix("")
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 4


def test_only_the_last_checkpoints_stay(straight: Straight) -> None:
    kept = sorted(p.name for p in (straight() / "checkpoints").glob("step-*"))
    assert kept == ["step-00000015", "step-00000020"]
