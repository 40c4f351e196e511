"""Traces of chosen steps: which steps, which file, which stages."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from fastjepa.observe.profile import StepProfile
from fastjepa.observe.stages import stage

CPU = torch.device("cpu")


def names(path: Path) -> list[str]:
    """What a trace says of our stages, in order of time."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    ours = [e for e in events if e.get("ph") == "X" and e["name"].startswith("fastjepa: ")]
    return [e["name"].removeprefix("fastjepa: ") for e in sorted(ours, key=lambda e: e["ts"])]


def take(profile: StepProfile, steps: range) -> list[Path]:
    """Steps that each have a phase; the files that came of them."""
    found = []
    for step in steps:
        profile.before(step)
        with stage("target" if step % 2 else "loss"):
            torch.ones(4).sum()
        found.append(profile.after(step))
    return [path for path in found if path is not None]


def test_the_chosen_steps_and_no_other_are_recorded(tmp_path: Path) -> None:
    profile = StepProfile((3, 4), tmp_path / "profile", rank=2, device=CPU)
    (path,) = take(profile, range(1, 7))
    assert path == tmp_path / "profile/steps-3-4.rank-2.json.gz"
    assert names(path) == ["target", "loss"]
    assert profile.close() is None


@pytest.mark.parametrize(
    ("steps", "name"),
    [(range(1, 6), "steps-4-5.rank-0.json.gz"), (range(6, 8), "steps-6-7.rank-0.json.gz")],
    ids=["stopped early", "begun late"],
)
def test_what_there_is_of_them_is_written(tmp_path: Path, steps: range, name: str) -> None:
    profile = StepProfile((4, 9), tmp_path, rank=0, device=CPU)
    assert take(profile, steps) == []
    path = profile.close()
    assert path == tmp_path / name
    assert len(names(path)) == 2


def test_a_run_that_never_comes_there_writes_nothing(tmp_path: Path) -> None:
    profile = StepProfile((4, 9), tmp_path / "profile", rank=0, device=CPU)
    assert take(profile, range(1, 4)) == []
    assert profile.close() is None
    assert not (tmp_path / "profile").exists()
