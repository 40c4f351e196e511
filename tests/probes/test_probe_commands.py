"""`fastjepa probe`: every probe on real files, its table and JSON, and going on after a kill."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastjepa.cli import main


def probe(*words: object) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["probe", *map(str, words), "--device", "cpu"])
    assert not ended.value.code


def result(out: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / f"{name}.json").read_text("utf-8"))
    return found


def test_knn_of_a_random_encoder_is_above_chance(
    weights: Path, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probe("knn", weights, classes / "train", classes / "test", "--size", 32, "--out", tmp_path)
    found = result(tmp_path, "knn")
    assert found["scores"]["accuracy"] > 0.3  # chance is 0.1
    assert found["chosen"]["k"] in [row["k"] for row in found["candidates"]]
    best = max(row["held_out"] for row in found["candidates"])
    (chosen,) = [row for row in found["candidates"] if row["k"] == found["chosen"]["k"]]
    assert chosen["held_out"] == best
    assert chosen["test"] == found["scores"]["accuracy"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"knn of {weights}"
    assert any(line.split() == ["k", "held_out", "test"] for line in lines)


def test_attentive_reads_videos_in_segments(weights: Path, videos: Path, tmp_path: Path) -> None:
    probe(
        "attentive", weights, videos / "train.csv", videos / "test.csv", "--size", 32, "--frames",
        2, "--fps", 8, "--segments", 2, "--epochs", 2, "--lr", 1e-3, "--lr", 1e-2,
        "--weight-decay", 0.1, "--holdout", 0.25, "--level", 1, "--out", tmp_path,
    )  # fmt: skip
    found = result(tmp_path, "attentive")
    assert [(row["lr"], row["weight_decay"]) for row in found["candidates"]] == [
        (1e-3, 0.1), (1e-2, 0.1),
    ]  # fmt: skip
    assert found["scores"]["accuracy"] * 4 in range(5)
    assert found["setup"]["level"] == 1
    assert found["skipped"] == {}


def test_segmentation_names_every_class_and_skips_what_is_broken(
    weights: Path, dense: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(dense, data)
    (data / "train/images/3.png").write_bytes(b"no picture")
    probe(
        "segmentation", weights, data / "train", data / "test", "--size", 32, "--epochs", 8,
        "--lr", 1e-2, "--head-batch", 4, "--out", tmp_path / "out",
    )  # fmt: skip
    found = result(tmp_path / "out", "segmentation")
    assert set(found["parts"]) == {"class 0", "class 1"}
    ious = [part["iou"] for part in found["parts"].values()]
    assert found["scores"]["miou"] == pytest.approx(sum(ious) / 2)
    assert found["scores"]["miou"] > 0.3
    assert len(found["candidates"]) == 3
    assert [Path(path).name for path in found["skipped"]] == ["3.png"]


def test_a_label_to_ignore_is_no_class(weights: Path, dense: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(dense, data)
    for mask in data.glob("*/masks/*.png"):
        labels = np.array(Image.open(mask))
        labels[:4] = 9
        Image.fromarray(labels).save(mask)
    words = [
        "segmentation", weights, data / "train", data / "test", "--size", 32, "--epochs", 1,
        "--lr", 1e-3, "--weight-decay", 0.1, "--out", tmp_path / "out",
    ]  # fmt: skip
    probe(*words)
    probe(*words, "--ignore", 9)
    found = result(tmp_path / "out", "segmentation")
    assert found["setup"]["classes"] == 2
    assert set(found["parts"]) == {"class 0", "class 1"}


@pytest.mark.parametrize(("part", "label"), [("train", 3), ("train", -1), ("test", 3)])
def test_a_label_that_is_no_class_is_named_with_its_mask_at_once(
    weights: Path, dense: Path, tmp_path: Path, part: str, label: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(dense, data)
    mask = data / part / "masks/2.png"
    labels = np.array(Image.open(mask)).astype(np.int64)
    labels[0, 0] = label
    mask.unlink()
    np.save(mask.with_suffix(".npy"), labels)
    with pytest.raises(SystemExit) as ended:
        main([
            "probe", "segmentation", str(weights), str(data / "train"), str(data / "test"),
            "--size", "32", "--classes", "2", "--device", "cpu", "--out", str(out),
        ])  # fmt: skip
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"2.npy: label {label}; expected classes from 0 to 1" in last
    assert not out.exists()


def test_depth_is_between_its_limits(weights: Path, dense: Path, tmp_path: Path) -> None:
    probe(
        "depth", weights, dense / "train", dense / "test", "--size", 32, "--epochs", 6, "--low",
        0.5, "--high", 3, "--lr", 1e-3, "--weight-decay", 1e-3, "--out", tmp_path,
    )  # fmt: skip
    scores = result(tmp_path, "depth")["scores"]
    assert set(scores) == {"rmse", "abs_rel", "delta1"}
    # 1 and 2 m: whoever says something in between is never more than 1 m wrong.
    assert 0.0 < scores["rmse"] < 1.0


def test_tracking_follows_digits(
    weights: Path, davis: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probe("tracking", weights, davis, "--size", 64, "--out", tmp_path)
    found = result(tmp_path, "tracking")
    assert set(found["parts"]) == {"one 1", "one 2", "two 1", "two 2"}
    for name in ("J", "F"):
        mean = sum(part[name] for part in found["parts"].values()) / 4
        assert found["scores"][name] == pytest.approx(mean)
    both = (found["scores"]["J"] + found["scores"]["F"]) / 2
    assert found["scores"]["J&F"] == pytest.approx(both)
    assert found["scores"]["J"] > 0.15  # slow digits, and even random features see their edges
    assert "two 2" in capsys.readouterr().out


def test_a_video_that_was_tracked_is_not_tracked_again(
    weights: Path, davis: Path, tmp_path: Path
) -> None:
    words = ["tracking", weights, davis, "--out", tmp_path, "--size"]
    probe(*words, 32)
    first = result(tmp_path, "tracking")
    (tmp_path / "tracking/two.json").unlink()
    kept = tmp_path / "tracking/one.json"
    marked = json.loads(kept.read_text("utf-8"))
    marked["objects"]["1"]["J"] = 7.0
    kept.write_text(json.dumps(marked), "utf-8")
    probe(*words, 32)
    again = result(tmp_path, "tracking")
    assert again["parts"]["one 1"]["J"] == 7.0
    assert again["parts"]["two 1"] == first["parts"]["two 1"]
    probe(*words, 40)  # seen otherwise, it is
    assert result(tmp_path, "tracking")["parts"]["one 1"]["J"] <= 1.0


@pytest.mark.parametrize(
    "changed", ["Annotations/480p/one/00002.png", "JPEGImages/480p/one/00001.jpg"]
)
def test_a_video_whose_masks_or_frames_changed_is_tracked_again(
    weights: Path, davis: Path, tmp_path: Path, changed: str
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(davis, data)
    probe("tracking", weights, data, "--size", 32, "--out", out)
    for name in ("one", "two"):
        kept = out / f"tracking/{name}.json"
        marked = json.loads(kept.read_text("utf-8"))
        marked["objects"]["1"]["J"] = 7.0
        kept.write_text(json.dumps(marked), "utf-8")
    os.utime(data / changed, ns=(1, 1))
    probe("tracking", weights, data, "--size", 32, "--out", out)
    parts = result(out, "tracking")["parts"]
    assert parts["one 1"]["J"] <= 1.0
    assert parts["two 1"]["J"] == 7.0


def test_heads_of_other_labels_are_not_taken_for_these(
    weights: Path, dense: Path, tmp_path: Path
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(dense, data)
    words = [
        "segmentation", weights, data / "train", data / "test", "--size", 32, "--epochs", 1,
        "--lr", 1e-3, "--weight-decay", 0.1, "--out", out,
    ]  # fmt: skip
    probe(*words)
    mask = data / "train/masks/1.png"
    Image.fromarray(1 - np.array(Image.open(mask))).save(mask)
    os.utime(mask, ns=(1, 1))
    probe(*words)
    assert len(list((out / "heads").iterdir())) == 2
    assert len(list((out / "features").iterdir())) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["knn", "{c}/train", "{c}/test", "--size", "30"], "size: 30 is no multiple"),
        (["knn", "{c}/train", "{c}/test", "--k", "900"], r"ks is \[900\], expected some from 1"),
        (["knn", "{c}/nowhere", "{c}/test"], "neither a folder nor a CSV"),
        (["segmentation", "{c}/train", "{c}/test"], "expected the folders images and masks"),
        (["tracking", "{c}"], "expected the layout of DAVIS"),
        (["attentive", "{c}/train", "{c}/test", "--level", "7"], r"level: expected one of \[1, 2"),
        (["knn", "{c}/train", "{c}/test", "--fps", "0"], "fps: 0, expected a number above 0"),
        (["tracking", "{d}", "--temperature", "0"], "temperature: 0, expected a number above 0"),
        (["tracking", "{d}", "--radius", "-1"], "radius: -1, expected 0 or more"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, weights: Path, classes: Path, davis: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    kind, *rest = [word.format(c=classes, d=davis) for word in words]
    if "--size" not in rest:
        rest += ["--size", "32"]
    with pytest.raises(SystemExit) as ended:
        main(["probe", kind, str(weights), *rest, "--device", "cpu", "--out", str(tmp_path)])
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert re.search(message, last), last


def test_a_killed_probe_goes_on_to_the_same_result(
    weights: Path, classes: Path, tmp_path: Path
) -> None:
    for part, count in (("train", 40), ("test", 8)):
        files = sorted((classes / part).rglob("*.png"), key=lambda file: int(file.stem))[:count]
        rows = [f"{file},{file.parent.name}" for file in files]
        (tmp_path / f"{part}.csv").write_text("\n".join(["path,label", *rows]) + "\n")

    lists = [str(tmp_path / f"{part}.csv") for part in ("train", "test")]

    def words(out: Path) -> list[str]:
        return [
            "attentive", str(weights), *lists,
            "--size", "32", "--epochs", "10", "--head-batch", "18", "--lr", "1e-3",
            "--weight-decay", "0.1", "--out", str(out),
        ]  # fmt: skip

    out = tmp_path / "killed"
    run = subprocess.Popen(
        [sys.executable, "-m", "fastjepa.cli", "probe", *words(out), "--device", "cpu"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while not list(out.glob("heads/attentive-*.safetensors")):
            assert run.poll() is None
            time.sleep(0.02)
    finally:
        run.kill()
        run.wait()
    shards = {file: file.stat().st_mtime_ns for file in out.glob("features/*/*.safetensors")}
    assert len(shards) == 2 + 1
    probe(*words(out))
    assert shards == {file: file.stat().st_mtime_ns for file in shards}
    probe(*words(tmp_path / "whole"))
    assert result(out, "attentive") == result(tmp_path / "whole", "attentive")
