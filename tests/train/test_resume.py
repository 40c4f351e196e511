"""Stopping and going on: a run cut anywhere ends with the weights of one that was not."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastjepa.checkpoint import latest_checkpoint

from .conftest import finish, run, start, wait_for_step

Write = Callable[..., Path]


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
def test_killed_run_ends_bit_identical(write_recipe: Write, settings: dict[str, object]) -> None:
    straight, cut = write_recipe("straight", **settings), write_recipe("cut", **settings)
    assert run(straight)[0] == 0
    process = start(cut)
    wait_for_step(cut.with_suffix(""), 12, process)
    process.send_signal(signal.SIGKILL)
    finish(process)
    code, out = run(cut)
    assert code == 0
    assert "resumed from" in out
    assert_same(weights(straight.with_suffix(""), 20), weights(cut.with_suffix(""), 20))
    steps = [
        json.loads(line)["step"]
        for line in (cut.with_suffix("") / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(1, 21))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signal_saves_and_says_how_to_go_on(write_recipe: Write, name: str) -> None:
    recipe = write_recipe("run", workers=1)
    process = start(recipe)
    wait_for_step(recipe.with_suffix(""), 3, process)
    process.send_signal(getattr(signal, name))
    code, out = finish(process)
    assert code == 0
    assert f"stopped by {name}" in out
    assert f"train {recipe}" in out.split("to go on: ")[1]
    saved = latest_checkpoint(recipe.with_suffix(""))
    assert saved is not None
    code, out = run(recipe)
    assert code == 0
    straight = write_recipe("straight", workers=0)
    assert run(straight)[0] == 0
    assert_same(weights(straight.with_suffix(""), 20), weights(recipe.with_suffix(""), 20))


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


def test_only_the_last_checkpoints_stay(write_recipe: Write) -> None:
    recipe = write_recipe("run")
    assert run(recipe)[0] == 0
    kept = sorted(p.name for p in (recipe.with_suffix("") / "checkpoints").glob("step-*"))
    assert kept == ["step-00000015", "step-00000020"]
