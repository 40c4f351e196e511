import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastjepa.build_data import quarantine_of
from fastjepa.config.load import load_recipe
from fastjepa.data.files import Entry, Files
from fastjepa.data.quarantine import Quarantine, TooManyBadFiles
from fastjepa.observe.console import Console
from fastjepa.train.ranks import Ranks

from ..processes import ROOT, finish


def _rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_bad_file_is_one_line_however_often_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "run" / "quarantine.jsonl"
    quarantine = Quarantine(path, 0.5, 10)
    assert quarantine.add([("/a.mp4", "empty"), ("/b\n.mp4", "short")]) == [
        ("/a.mp4", "empty"),
        ("/b\n.mp4", "short"),
    ]
    assert quarantine.add([("/a.mp4", "gone"), ("/c.mp4", "broken")]) == [("/c.mp4", "broken")]
    assert quarantine.add([]) == []
    assert [row["path"] for row in _rows(path)] == ["/a.mp4", "/b\n.mp4", "/c.mp4"]
    assert _rows(path)[0]["reason"] == "empty"
    assert _rows(path)[0]["time"].endswith("+00:00")
    assert len(quarantine) == 3


def test_a_restart_reads_them_back_and_counts_none_twice(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path, 0.5, 4).add([("/a.mp4", "empty"), ("/b.mp4", "empty")])
    again = Quarantine(path, 0.5, 4)
    assert len(again) == 2
    assert again.add([("/a.mp4", "empty")]) == []
    with pytest.raises(TooManyBadFiles, match="3 of 4 files cannot be read, above max_bad_share"):
        again.add([("/c.mp4", "empty")])
    assert len(_rows(path)) == 3


def test_too_many_is_said_after_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(path, 0.25, 8)
    quarantine.add([("/a.mp4", "empty"), ("/b.mp4", "empty")])
    with pytest.raises(
        TooManyBadFiles, match=r"0\.25.*/c\.mp4: broken.*quarantine\.jsonl"
    ) as caught:
        quarantine.add([("/c.mp4", "broken")])
    assert caught.value.bad == [("/c.mp4", "broken")]
    assert len(_rows(path)) == 3


def test_too_many_are_too_many_at_every_start(tmp_path: Path) -> None:
    own = [f"run.folder={tmp_path}", "data.max_bad_share=0.5"]
    recipe = load_recipe(ROOT / "configs/demo.yaml", own)
    manifest = Files.of([Entry("/a.mp4", "video")], [("/b.mp4", "empty"), ("/c.mp4", "empty")])
    for _ in range(2):
        with pytest.raises(TooManyBadFiles, match="2 of 3 files cannot be read"):
            quarantine_of(recipe, [manifest], 1, Console(), Ranks())
    assert len(_rows(tmp_path / "quarantine.jsonl")) == 2


# What a rank of two says of one more bad file, where the run's folder names one.
DECIDE = """
import sys
import torch
from fastjepa.build_data import quarantine_of
from fastjepa.config.load import load_recipe
from fastjepa.data.quarantine import TooManyBadFiles
from fastjepa.observe.console import Console
from fastjepa.train.ranks import Ranks
rank, folder = int(sys.argv[1]), sys.argv[2]
place = f"file://{folder}/meeting"
torch.distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
recipe = load_recipe("configs/demo.yaml", [f"run.folder={folder}", "data.max_bad_share=0.25"])
quarantine = quarantine_of(recipe, [], 4, Console(), Ranks(rank, 2))
try:
    quarantine.add([("/b.mp4", "empty")])
except TooManyBadFiles as error:
    print(len(quarantine), str(error).partition(" cannot")[0])
torch.distributed.destroy_process_group()
"""


def test_all_ranks_know_what_a_run_before_met(tmp_path: Path) -> None:
    Quarantine(tmp_path / "quarantine.jsonl", 0.25, 4).add([("/a.mp4", "empty")])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", DECIDE, str(rank), str(tmp_path)], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    assert [finish(rank) for rank in ranks] == [(0, "2 2 of 4 files\n")] * 2


def test_no_good_file_left_stops_at_any_share() -> None:
    quarantine = Quarantine(None, 1.0, 2)
    quarantine.add([("/a.mp4", "empty")])
    with pytest.raises(TooManyBadFiles, match=r"2 of 2 files cannot be read; the last is /b\.mp4"):
        quarantine.add([("/b.mp4", "empty")])


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path, 0.5, 10).add([("/a.mp4", "empty"), ("/b.mp4", "empty")])
    path.write_bytes(path.read_bytes()[:-20])
    quarantine = Quarantine(path, 0.5, 10)
    assert len(quarantine) == 1
    quarantine.add([("/b.mp4", "empty")])
    assert [row["path"] for row in _rows(path)] == ["/a.mp4", "/b.mp4"]
    assert len(Quarantine(path, 0.5, 10)) == 2


def test_a_file_that_is_no_quarantine(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    path.write_text('{"path": "/a.mp4", "reason": "x"}\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2: expected path and reason"):
        Quarantine(path, 0.5, 10)


@pytest.mark.parametrize(("share", "total"), [(-0.1, 3), (1.1, 3), (float("nan"), 3), (0.5, 0)])
def test_limits_that_cannot_be(share: float, total: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        Quarantine(None, share, total)
