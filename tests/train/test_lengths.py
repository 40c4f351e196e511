"""Videos of two lengths and images in one run: each has its loss logged and its share of a step."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fastjepa.observe.sinks import read_metrics

from .conftest import run

Write = Callable[..., Path]
SHARES = {"video": 0.45, "video_8f": 0.3, "image": 0.25}


def rows(write_recipe: Write, mix: str) -> list[dict[str, float]]:
    lengths = "[{frames: 8, batch: 1, share: 0.4, crop: 96, fps: 4}]"
    recipe = write_recipe("run", mix=mix, lengths=lengths)
    code, out = run(recipe, "train.steps=8", "observe.pictures=true")
    assert code == 0, out
    folder = recipe.with_suffix("")
    assert (folder / "features.png").exists()
    return read_metrics(folder / "metrics.jsonl")


def test_accumulated_losses_are_weighed_by_their_shares(write_recipe: Write) -> None:
    for row in rows(write_recipe, "accumulate"):
        parts = {name: row[f"loss/{name}"] for name in SHARES}
        assert row["loss"] == pytest.approx(sum(SHARES[n] * parts[n] for n in SHARES), rel=1e-5)
        assert row["image_share"] == 0.25
        assert 0.0 <= row["data_wait"] <= 1.0


def test_an_alternating_step_has_the_loss_of_its_stream_alone(write_recipe: Write) -> None:
    seen = set()
    for row in rows(write_recipe, "alternate"):
        (name,) = (key for key in row if key.startswith("loss/"))
        assert row[name] == pytest.approx(row["loss"])
        seen.add(name.removeprefix("loss/"))
    assert seen == set(SHARES)
