"""Videos of two lengths and images in one run: each has its loss logged and its share of a step."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fastjepa.observe.sinks import read_metrics

from .conftest import run

Write = Callable[..., Path]
SHARES = {"video": 0.45, "video_8f": 0.3, "image": 0.25}


def rows(write_recipe: Write, mix: str, *overrides: str) -> list[dict[str, float]]:
    lengths = "[{frames: 8, batch: 1, share: 0.4, crop: 96, fps: 4}]"
    recipe = write_recipe("-".join(("run", *overrides)), mix=mix, lengths=lengths)
    code, out = run(recipe, "train.steps=8", "observe.pictures=true", *overrides)
    assert code == 0, out
    folder = recipe.with_suffix("")
    assert (folder / "features.png").exists()
    return read_metrics(folder / "metrics.jsonl")


def test_accumulated_losses_are_weighed_by_their_shares_packed_into_one_sequence_or_not(
    write_recipe: Write,
) -> None:
    alone = rows(write_recipe, "accumulate")
    packed = rows(write_recipe, "accumulate", "engine.micro_batches=packed")
    for row in (*alone, *packed):
        parts = {name: row[f"loss/{name}"] for name in SHARES}
        assert row["loss"] == pytest.approx(sum(SHARES[n] * parts[n] for n in SHARES), rel=1e-5)
        assert row["image_share"] == 0.25
        assert 0.0 <= row["data_wait"] <= 1.0
    for one, other in zip(alone, packed, strict=True):
        for key in ("loss", "loss/video", "loss/video_8f", "loss/image", "grad_norm"):
            assert other[key] == pytest.approx(one[key], rel=1e-3), key


def test_an_alternating_step_has_the_loss_of_its_stream_alone(write_recipe: Write) -> None:
    seen = set()
    for row in rows(write_recipe, "alternate"):
        (name,) = (key for key in row if key.startswith("loss/"))
        assert row[name] == pytest.approx(row["loss"])
        seen.add(name.removeprefix("loss/"))
    assert seen == set(SHARES)
