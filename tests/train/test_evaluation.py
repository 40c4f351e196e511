"""Evaluation while a run trains: a probe and a picture in the log, and the run as it was."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import Ridge
from torch import Tensor

from fastjepa.build import build
from fastjepa.checkpoint import latest_checkpoint, load_checkpoint
from fastjepa.config.load import load_recipe
from fastjepa.data.augment import normalise
from fastjepa.data.moving_digits import MovingDigits
from fastjepa.evaluation import ClassProbe
from fastjepa.observe.sinks import read_metrics
from fastjepa.train.signals import StopRequest

Write = Callable[..., Path]
EVALUATE = ("evaluate.every=3", "evaluate.count=20")
# What is measured of the machine, and what is counted from one logged step to the next.
OTHERWISE = ("_seconds", "_per_second", "data_wait", "mfu", "memory_gib", "target_drift")


def trained(recipe: Path, *changes: str) -> Path:
    """The folder of a run of six steps."""
    assert build(load_recipe(recipe, ["train.steps=6", "train.log_every=2", *changes])).run(
        StopRequest()
    )
    return recipe.with_suffix("")


def state(folder: Path) -> dict[str, dict[str, Tensor]]:
    path = latest_checkpoint(folder)
    assert path is not None
    return load_checkpoint(path).tensors


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_goes_the_same_way_with_and_without(write_recipe: Write, workers: int) -> None:
    without = trained(write_recipe("without", workers=workers))
    evaluated = trained(write_recipe("with", workers=workers), *EVALUATE)
    wanted, found = state(without), state(evaluated)
    for part in ("encoder", "predictor", "target_encoder", "optimizer", "rng"):
        assert all(torch.equal(found[part][n], t) for n, t in wanted[part].items()), part
    rows = {row["step"]: row for row in read_metrics(evaluated / "metrics.jsonl")}
    for row in read_metrics(without / "metrics.jsonl"):
        for key, value in row.items():
            if not key.endswith(OTHERWISE):
                assert rows[row["step"]][key] == value, f"{key} at step {row['step']}"


def test_probe_and_picture_are_in_the_log_and_in_the_folder(write_recipe: Write) -> None:
    folder = trained(write_recipe("run"), *EVALUATE)
    rows = {row["step"]: row for row in read_metrics(folder / "metrics.jsonl")}
    assert set(rows) == {1, 2, 3, 4, 6}
    for step, row in rows.items():
        levels = {key for key in row if key.startswith("probe_r2/")}
        assert levels == ({f"probe_r2/level{i}" for i in range(4)} if step % 3 == 0 else set())
        assert all(row[key] <= 1.0 for key in levels)
    files = sorted(path.name for path in (folder / "pictures").iterdir())
    assert files == ["step-00000003.png", "step-00000006.png"]
    pixels = np.asarray(Image.open(folder / "pictures" / files[0]).convert("RGB"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    shown = events.Images("features")
    assert [event.step for event in shown] == [3, 6]
    assert (shown[0].height, shown[0].width) == pixels.shape[:2]
    assert {event.step for event in events.Scalars("probe_r2/level3")} == {3, 6}


def test_collapse_would_show_in_every_logged_step_without_it(write_recipe: Write) -> None:
    """Rank of the features, their deviation at each level, deviation and length of the targets."""
    folder = trained(write_recipe("run"))
    for row in read_metrics(folder / "metrics.jsonl"):
        assert 1.0 <= row["effective_rank/level3"] <= 48.0
        for level in range(4):
            assert row[f"feature_std/level{level}"] > 0.0
            assert row[f"target_std/level{level}"] > 0.0
            # Of normed features of width 48, whose norms have only begun to learn.
            assert row[f"target_norm/level{level}"] == pytest.approx(48**0.5, rel=0.1)


def test_what_it_measures_is_the_average_on_clips_that_are_known(write_recipe: Write) -> None:
    """By hand, on all patches at once: the checkpoint's average, a ridge of scikit-learn."""
    folder = trained(write_recipe("run"), *EVALUATE)
    target = build(load_recipe(write_recipe("run"), ["train.steps=6", "train.log_every=2"])).jepa
    sources = [MovingDigits(4, 64, 64, 8.0, 1, split=split) for split in ("train", "test")]
    found = []
    for source in sources:
        clips = [source[index] for index in range(10)]
        pixels = torch.stack([torch.from_numpy(clip.frames) for clip in clips])
        with torch.no_grad():
            (x,) = target.target.features(normalise(pixels.permute(0, 4, 1, 2, 3)), [3])
        inside = np.stack([clip.mask > 0 for clip in clips])
        cover = inside.reshape(10, 2, 2, 4, 16, 4, 16).mean((2, 4, 6))
        found.append((x.flatten(0, 3).double().numpy(), cover.flatten()))
    (x, y), (tx, ty) = found
    mean, std = x.mean(0), x.std(0)
    fitted = Ridge(alpha=1e-2 * len(x)).fit((x - mean) / std, y)
    wanted = fitted.score((tx - mean) / std, ty)
    last = read_metrics(folder / "metrics.jsonl")[-1]
    assert last["probe_r2/level3"] == pytest.approx(wanted, abs=1e-3)


def pictures(folder: Path, count: int) -> Path:
    """Red and blue squares with noise, a folder for each colour."""
    generator = np.random.default_rng(0)
    for channel, name in ((0, "red"), (2, "blue")):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 60, (64, 64, 3), dtype=np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def test_files_are_named_by_their_folder_or_by_a_list(write_recipe: Write, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "colours", 14)
    probe = ClassProbe(str(folder), 24, frames=4, fps=8.0, size=64, patch=16)
    assert probe.bank == 12
    assert probe.classes.bincount().tolist() == [12, 12]
    assert probe.classes[:12].bincount().tolist() == [6, 6]
    listed = tmp_path / "colours.csv"
    files = [f"{file},{file.parent.name}\n" for file in sorted(folder.rglob("*.png"))]
    listed.write_text("".join(["path,label\n", *files]))
    again = ClassProbe(str(listed), 24, frames=4, fps=8.0, size=64, patch=16)
    assert torch.equal(again.classes, probe.classes)
    assert all(map(torch.equal, again.clips, probe.clips))
    run = trained(write_recipe("run"), *EVALUATE, f"evaluate.clips={folder}")
    # Colours are told apart by any features.
    assert read_metrics(run / "metrics.jsonl")[-1]["probe_knn/level3"] == 1.0


def test_folders_that_name_nothing_are_refused(write_recipe: Write, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "colours", 14)
    (folder / "blue").rename(tmp_path / "blue")
    one = load_recipe(write_recipe("run"), [*EVALUATE, f"evaluate.clips={folder}"])
    with pytest.raises(ValueError, match=r"evaluate\.clips .* 1 class"):
        build(one)


def test_a_run_on_images_alone_is_probed_on_images(write_recipe: Write) -> None:
    folder = trained(write_recipe("run"), *EVALUATE, "data.video=[]")
    assert "probe_r2/level3" in read_metrics(folder / "metrics.jsonl")[-1]
