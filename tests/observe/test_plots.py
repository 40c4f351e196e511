"""The picture exists, is readable as a PNG, and shows what was logged."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastjepa.observe.plots import loss_curve


def log(path: Path, count: int, *keys: str) -> Path:
    rows = [
        {"step": 10 * i} | {key: nth / (i + 1) for nth, key in enumerate(keys, start=1)}
        for i in range(1, count + 1)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def draw(tmp_path: Path, count: int, *keys: str) -> Image.Image:
    loss_curve(log(tmp_path / "metrics.jsonl", count, *keys), tmp_path / "curve.png", "a run")
    with Image.open(tmp_path / "curve.png") as image:
        image.load()
        return image


LEVELS = [f"{metric}/level{n}" for metric in ("loss_predict", "feature_std") for n in (2, 11)]


@pytest.mark.parametrize("count", [1, 30, 300])
def test_a_run_of_any_length_is_drawn(tmp_path: Path, count: int) -> None:
    image = draw(tmp_path, count, "loss", "context_weight", *LEVELS)
    assert image.format == "PNG"
    assert np.asarray(image.convert("L")).std() > 5
    assert sorted(os.listdir(tmp_path)) == ["curve.png", "metrics.jsonl"]


def test_what_was_not_logged_takes_no_room(tmp_path: Path) -> None:
    assert draw(tmp_path, 5, "loss").width < draw(tmp_path, 5, "loss", "context_weight").width


def test_every_level_is_a_line_of_its_own(tmp_path: Path) -> None:
    def shades(*keys: str) -> int:
        pixels = np.asarray(draw(tmp_path, 30, "loss", *keys).convert("RGB")).reshape(-1, 3)
        vivid = pixels[np.ptp(pixels.astype(int), axis=1) > 60]
        _, counts = np.unique(vivid, axis=0, return_counts=True)
        return int((counts > 60).sum())

    one, four = shades("loss_predict"), shades(*(f"loss_predict/level{n}" for n in (2, 5, 8, 11)))
    assert four >= one + 3


def test_numbers_that_are_not_finite_are_gaps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": null}\n{"step": 3, "loss": 2}\n')
    loss_curve(path, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").exists()


def test_a_run_without_a_loss_is_named_and_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for content in ("", '{"step": 1, "loss": null}\n', '{"step": 1, "lr": 0.1}\n'):
        path.write_text(content)
        with pytest.raises(
            ValueError, match=r"metrics\.jsonl: no logged step holds a finite `loss`"
        ):
            loss_curve(path, tmp_path / "curve.png")
    path.unlink()
    with pytest.raises(FileNotFoundError):
        loss_curve(path, tmp_path / "curve.png")
    assert os.listdir(tmp_path) == []
