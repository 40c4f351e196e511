"""The command that probes files: real files, real processes, and all that can happen to them."""

import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet
from typer.testing import CliRunner

from fastjepa.cli import app
from fastjepa.data.cache import Cache
from fastjepa.data.files import ManifestError
from fastjepa.data.manifest import read_manifest
from fastjepa.data.probe import probe
from fastjepa.data.probe_notes import ProbeNotes


def _command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "fastjepa.cli", "index", *map(str, arguments)]


def _index(*arguments: object) -> tuple[str, str]:
    """Run the command to its end; what it printed and what it said of its progress."""
    result = CliRunner().invoke(app, ["index", *map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return result.stdout, result.stderr


def _rows(path: Path) -> dict[str, dict[str, Any]]:
    return {row["path"]: row for row in parquet.read_table(path).to_pylist()}


def _decodable(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


VIDEOS = {
    "h264.mp4": ("libx264", {"g": "12", "bf": "3"}),
    "open-gop.mkv": ("libx264", {"bf": "3", "x264-params": "open-gop=1:keyint=12:b-adapt=0"}),
    "hevc.mp4": ("libx265", {"x265-params": "log-level=none:keyint=12:bframes=3"}),
    # Frames that are referred to and never shown have packets of their own.
    "alt-ref.webm": ("libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "24"}),
    "vp9.webm": ("libvpx-vp9", {"auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "8"}),
    "mpeg4.avi": ("mpeg4", {"g": "12"}),
    "transport.ts": ("libx264", {"g": "12"}),
    "raw.h264": ("libx264", {"g": "12", "bf": "0"}),
}


@pytest.mark.parametrize("name", VIDEOS)
def test_frames_are_those_that_decode(tmp_path: Path, write_video: Callable, name: str) -> None:
    codec, options = VIDEOS[name]
    path = write_video(tmp_path / name, codec, pts=range(60), options=options)
    facts = probe(str(path), "video", Cache(tmp_path / "cache", 0))
    assert facts.readable
    assert facts.reason is None
    assert facts.frames == _decodable(path) == 60
    assert (facts.width, facts.height, facts.rotation) == (64, 48, 0)
    assert facts.duration == pytest.approx(2.5, abs=0.1)
    if name != "raw.h264":
        assert facts.fps == pytest.approx(24.0, rel=0.01)


@pytest.mark.parametrize("name", ["a.ts", "a.mkv", "a.mp4"])
def test_a_file_cut_off_has_the_frames_that_are_there(
    tmp_path: Path, write_video: Callable, name: str
) -> None:
    path = write_video(
        tmp_path / name, pts=range(96), options={"g": "8", "bf": "0"},
        container_options={"movflags": "faststart"} if name == "a.mp4" else {},
    )  # fmt: skip
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * 0.6)])
    facts = probe(str(path), "video", Cache(tmp_path / "cache", 0))
    assert facts.readable
    assert facts.frames is not None
    assert 20 < facts.frames < 90
    assert abs(facts.frames - _decodable_until_broken(path)) <= 1
    assert facts.duration == pytest.approx(facts.frames / 24, abs=0.1)


def _decodable_until_broken(path: Path) -> int:
    count = 0
    with av.open(str(path)) as container:
        try:
            for frame in container.decode(video=0):
                count += not frame.is_corrupt
        except av.FFmpegError:
            pass
    return count


def test_rotation_and_orientation(tmp_path: Path, write_video: Callable) -> None:
    cache = Cache(tmp_path / "cache", 0)
    video = write_video(tmp_path / "a.mp4", rotation=90, width=64, height=32)
    turned = probe(str(video), "video", cache)
    assert (turned.width, turned.height, turned.rotation) == (64, 32, 90)
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
    photo = probe(str(tmp_path / "a.jpg"), "image", cache)
    assert (photo.codec, photo.frames, photo.width, photo.height) == ("jpeg", 1, 40, 30)
    assert photo.rotation == 90
    assert photo.readable


def test_a_file_whose_middle_is_damaged_is_not_readable(
    tmp_path: Path, write_video: Callable
) -> None:
    path = write_video(tmp_path / "a.mp4", pts=range(96), options={"g": "8", "bf": "0"})
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        hurt = [
            p for p in container.demux(video=0) if p.pos and 32 <= p.pts * p.time_base * 24 < 64
        ]
        spans = [(p.pos, p.size) for p in hurt]
    for start, size in spans:
        data[start + 4 : start + size] = b"\xff" * (size - 4)
    path.write_bytes(data)
    facts = probe(str(path), "video", Cache(tmp_path / "cache", 0))
    assert not facts.readable
    assert facts.reason
    assert facts.codec == "h264"


@pytest.fixture
def folder(tmp_path: Path, clips: Path) -> Path:
    """Three good videos, a picture, one member of a shard and two bad files."""
    folder = tmp_path / "media"
    folder.mkdir()
    for number, clip in enumerate(sorted(clips.iterdir())[:3]):
        (folder / f"clip{number}.mp4").write_bytes(clip.read_bytes())
    Image.new("RGB", (40, 30)).save(folder / "photo.png")
    with tarfile.open(folder / "shard.tar", "w") as tar:
        tar.add(folder / "clip0.mp4", "m/member.mp4")
    (folder / "empty.mp4").touch()
    (folder / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(3000))
    return folder


def test_an_index_is_a_manifest_without_the_unreadable(folder: Path) -> None:
    said, progress = _index(folder, "--workers", 2)
    place = folder.parent / "media.index.parquet"
    assert f"wrote {place}" in said
    assert "4 h264" in said
    assert "5 readable files: 193 frames, 0.00 hours of video" in said
    assert "1 unreadable: the file is empty" in said
    assert "7 files, 7 to probe" in progress
    rows = _rows(place)
    assert list(rows) == [
        "media/clip0.mp4", "media/clip1.mp4", "media/clip2.mp4", "media/empty.mp4",
        "media/noise.mp4", "media/photo.png", "media/shard.tar::m/member.mp4",
    ]  # fmt: skip
    first = rows["media/clip0.mp4"]
    assert first["size"] == (folder / "clip0.mp4").stat().st_size
    assert first["mtime_ns"] == (folder / "clip0.mp4").stat().st_mtime_ns
    assert first["frames"] == 48
    files = read_manifest(str(place))
    assert [os.path.relpath(entry.path, folder) for entry in files] == [
        "clip0.mp4", "clip1.mp4", "clip2.mp4", "photo.png", "shard.tar::m/member.mp4",
    ]  # fmt: skip
    assert {os.path.basename(path): reason for path, reason in files.bad} == {
        "empty.mp4": "the file is empty",
        "noise.mp4": "cannot be opened (Invalid data found when processing input)",
    }
    moved = folder.parent / "elsewhere"
    moved.mkdir()
    folder.rename(moved / "media")
    place.rename(moved / "list.parquet")
    assert os.path.isfile(read_manifest(str(moved / "list.parquet"))[0].path)
    assert list(moved.glob(".*")) == []


def test_only_new_and_changed_files_are_probed_again(folder: Path) -> None:
    place = folder.parent / "media.index.parquet"
    _index(folder, "--workers", 1)
    before = _rows(place)
    assert "7 files, 0 to probe" in _index(folder)[1]
    assert _rows(place) == before
    (folder / "empty.mp4").write_bytes((folder / "clip1.mp4").read_bytes())
    os.utime(folder / "clip0.mp4", ns=(1, 1))
    (folder / "clip2.mp4").unlink()
    (folder / "new.mp4").write_bytes((folder / "clip1.mp4").read_bytes())
    # The index itself stands for its files, the bad ones too; the folder shows new ones.
    assert "7 files, 3 to probe" in _index(place, "--workers", 1)[1]
    assert (
        _rows(place)["media/clip2.mp4"]["reason"] == "cannot be opened (No such file or directory)"
    )
    assert "7 files, 1 to probe" in _index(folder, "--workers", 1)[1]
    after = _rows(place)
    assert after["media/empty.mp4"]["readable"]
    assert after["media/clip0.mp4"]["mtime_ns"] == 1
    assert after["media/new.mp4"]["frames"] == 48
    assert "media/clip2.mp4" not in after
    assert "7 files, 1 to probe" in _index(folder, "--retry", "--workers", 1)[1]


def test_an_older_index_keeps_weight_kind_and_place_of_unreadable_files(tmp_path: Path) -> None:
    for name in ("a.png", "c.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    for name in ("b.png", "plain"):
        (tmp_path / name).touch()
    (tmp_path / "list.csv").write_text(
        "path,weight,kind\na.png,5,image\nb.png,0.5,image\nplain,2,image\nc.png,3,image\n"
    )
    _index(tmp_path / "list.csv", "--workers", 1)
    place = tmp_path / "list.index.parquet"
    before = [(row["path"], row["weight"], row["kind"]) for row in _rows(place).values()]
    for name in ("b.png", "plain"):
        Image.new("RGB", (8, 8)).save(tmp_path / name, format="png")
    _index(place, "--workers", 1)
    after = _rows(place).values()
    assert [(row["path"], row["weight"], row["kind"]) for row in after] == before
    assert all(row["readable"] for row in after)


def _wait_for_lines(path: Path, count: int, run: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and run.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.05)
    raise AssertionError("the results never came")


def test_a_killed_run_goes_on_where_it_stopped(folder: Path) -> None:
    """One file holds the run up for ever: a pipe into which nobody writes."""
    os.mkfifo(folder / "a-pipe.mp4")
    notes = folder.parent / ".media.index.parquet.part"
    run = subprocess.Popen(_command(folder, "--workers", 2, "--limit", 1000), text=True)
    _wait_for_lines(notes, 7, run)
    busy = subprocess.run(_command(folder), capture_output=True, text=True, timeout=120)
    assert busy.returncode == 2
    assert "another process is making this index" in busy.stderr
    workers = psutil.Process(run.pid).children(recursive=True)
    run.kill()
    run.wait()
    assert psutil.wait_procs(workers, timeout=60)[1] == []
    notes.write_bytes(notes.read_bytes() + b'{"path": "cut sho')
    (folder / "a-pipe.mp4").unlink()
    (folder / "a-pipe.mp4").write_bytes((folder / "clip1.mp4").read_bytes())
    said, progress = _index(folder, "--workers", 1)
    assert "an interrupted run left 7 results" in progress
    assert "8 files, 1 to probe" in progress
    assert "6 readable files" in said
    assert not notes.exists()


def test_a_file_that_hangs_or_kills_a_probe_costs_itself_only(folder: Path) -> None:
    """Pipes into which nobody writes come last: then the one worker is known to be at the first."""
    os.mkfifo(folder / "y-kills.mp4")
    os.mkfifo(folder / "z-hangs.mp4")
    run = subprocess.Popen(
        _command(folder, "--workers", 1, "--limit", 12), text=True, stdout=subprocess.PIPE
    )
    _wait_for_lines(folder.parent / ".media.index.parquet.part", 7, run)
    for process in psutil.Process(run.pid).children():
        if "spawn_main" in " ".join(process.cmdline()):
            process.kill()
    out, _ = run.communicate(timeout=300)
    assert run.returncode == 0
    reasons = {p: row["reason"] for p, row in _rows(folder.parent / "media.index.parquet").items()}
    assert "killed the process that probed it (exit code -9)" in reasons["media/y-kills.mp4"]
    assert reasons["media/z-hangs.mp4"] == "probe took longer than 12 s"
    assert "5 readable files" in out


def test_notes_that_are_none_are_refused(tmp_path: Path) -> None:
    place = tmp_path / "notes"
    place.write_text(json.dumps({"path": "/a", "size": None}) + "\n[]\n")
    with pytest.raises(ValueError, match="line 2: not what a probe found; remove the file"):
        ProbeNotes(place)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{folder}/*.mp4"], "say where to write its index with --out"),
        (["{folder}", "--out", "/nowhere/a.parquet"], "the folder /nowhere does not exist"),
        (["{folder}", "--out", "{folder}/a.csv"], r"expected \.parquet"),
        (["{folder}", "--out", "{folder}/list.parquet"], "exists and is no index"),
        (["{folder}/none"], "say where to write"),
    ],
)
def test_what_cannot_be_indexed_is_said(folder: Path, arguments: list[str], words: str) -> None:
    parquet.write_table(pyarrow.table({"path": ["a.mp4"]}), folder / "list.parquet")
    with pytest.raises(ValueError, match=words):
        _index(*(argument.format(folder=folder) for argument in arguments))
    assert list(folder.glob(".*")) == []


def test_an_index_of_bad_files_alone_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    said, _ = _index(tmp_path / "a.mp4", "--workers", 1)
    assert "0 readable files" in said
    with pytest.raises(ManifestError, match="1 files, none of them readable"):
        read_manifest(str(tmp_path / "a.index.parquet"))
