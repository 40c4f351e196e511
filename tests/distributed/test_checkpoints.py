"""Checkpoints in shares: a run goes on with other ranks and stages as if nothing had been.

The launches of checkpoints_worker.py are one run, 8 ranks to 2 to 1 to 4 to 2, at every ZeRO stage
and by the engine of one process.
"""

import importlib.util
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fastjepa.checkpoint import load_checkpoint

from ..processes import run_ranks

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The run's folder and what its ranks found."""
    place = tmp_path_factory.mktemp("run")
    worker = Path(__file__).with_name("checkpoints_worker.py")
    run_ranks([sys.executable, str(worker), str(place / "run"), str(place / "out.json")])
    return place / "run", json.loads((place / "out.json").read_text())


def test_every_launch_begins_with_the_bits_that_the_one_before_saved(
    run: tuple[Path, dict[str, Any]],
) -> None:
    launches = run[1]["launches"]
    assert [one["size"] for one in launches] == [8, 2, 1, 4, 2]
    assert {one["stage"] for one in launches} == {0, 1, 2, 3, None}
    for before, after in pairwise(launches):
        assert after["step"] == before["step"] + 2
        assert after["resumed"] == before["saved"], after


def test_the_losses_are_those_of_one_process_that_never_stopped(
    run: tuple[Path, dict[str, Any]],
) -> None:
    losses = [loss for one in run[1]["launches"] for loss in one["losses"]]
    assert losses == pytest.approx(run[1]["straight"], rel=1e-5)


def test_steps_taken_while_a_copy_is_written_do_not_reach_it(
    run: tuple[Path, dict[str, Any]],
) -> None:
    for one in run[1]["launches"]:
        assert one["moved"] != one["saved"]
        assert one["returned"] == one["saved"]


def test_a_rank_copies_and_writes_its_share(run: tuple[Path, dict[str, Any]]) -> None:
    total = run[1]["launches"][2]["bytes"][0]
    for one in run[1]["launches"]:
        assert sum(one["bytes"]) == total
        # Whole parameters at stage 0; at stage 3 the last rank's pieces may be shorter.
        assert max(one["bytes"]) < 1.6 * total / one["size"], one


def test_a_rank_that_cannot_write_stops_all_and_leaves_nothing(
    run: tuple[Path, dict[str, Any]],
) -> None:
    for one in run[1]["launches"]:
        if one["size"] > 1:
            assert len(one["without_room"]) == one["size"]
            for told in one["without_room"]:
                assert "File too large" in told
            assert one["left"] == []


def test_an_altered_share_is_named_on_every_rank_before_anything_is_changed(
    run: tuple[Path, dict[str, Any]],
) -> None:
    folder, found = run
    assert len(found["damage"]["told"]) == 2
    assert found["damage"]["untouched"]
    for told in found["damage"]["told"]:
        assert "optimizer-00002-of-00002.safetensors: damaged, its SHA-256 is " in told
        assert f"the previous complete checkpoint is {folder}/checkpoints/step-00000008" in told
    assert load_checkpoint(folder / "checkpoints" / "step-00000008").state["launch"]["size"] == 4


def test_bad_steps_on_one_rank_take_all_back_past_the_data(
    run: tuple[Path, dict[str, Any]],
) -> None:
    """Skipped at steps 5 and 6, back to 4: what follows is the data that nobody has seen."""
    back = run[1]["back"]
    assert back["finished"] == [True, True]
    assert back["returns"] == [[{"at": 7, "to": 4}]] * 2
    assert back["taken"] == [list(range(13))] * 2
    assert back["logged"] == list(range(1, 11))
