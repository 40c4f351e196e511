"""A checkpoint is written beside the training: what it holds, when it is there, how it fails."""

import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastjepa.checkpoint import latest_checkpoint, load_checkpoint, manifest
from fastjepa.checkpoint.pieces import Shares, whole
from fastjepa.durable import sync
from fastjepa.train.ranks import ALONE
from fastjepa.train.saver import SaveError, Saver


def shares(value: float, numbers: int = 64) -> Shares:
    return {"encoder": whole({"weight": torch.full((numbers,), value)})}


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A disk that brings nothing down before the event is set."""
    ready = threading.Event()

    def sync_then(path: Path) -> None:
        assert ready.wait(60)
        sync(path)

    monkeypatch.setattr(manifest, "sync", sync_then)
    yield ready
    ready.set()


def test_the_caller_goes_on_while_the_disk_is_slow(
    tmp_path: Path, slow_disk: threading.Event
) -> None:
    saver = Saver(tmp_path, ALONE, keep=2)
    saver.start(3, shares(3.0), {}, {"note": "kept"})
    saver.poll()
    assert latest_checkpoint(tmp_path) is None
    slow_disk.set()
    saver.wait()
    found = load_checkpoint(tmp_path / "checkpoints" / "latest")
    assert (found.step, found.state) == (3, {"note": "kept"})
    assert torch.equal(found.tensors["encoder"]["weight"], torch.full((64,), 3.0))


def test_the_next_one_begins_when_the_one_before_is_complete(
    tmp_path: Path, slow_disk: threading.Event
) -> None:
    saver = Saver(tmp_path, ALONE, keep=1)
    saver.start(1, shares(1.0), {}, {})
    second = threading.Thread(target=saver.start, args=(2, shares(2.0), {}, {}))
    second.start()
    assert [path.name[:18] for path in (tmp_path / "checkpoints").iterdir()] == [
        ".tmp-step-00000001"
    ]
    slow_disk.set()
    second.join(60)
    saver.wait()
    assert load_checkpoint(tmp_path / "checkpoints" / "latest").step == 2
    assert not (tmp_path / "checkpoints" / "step-00000001").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_told_after_the_step_and_the_old_checkpoint_stands(small_disk: Path) -> None:
    saver = Saver(small_disk, ALONE, keep=2)
    saver.start(1, shares(1.0), {}, {})
    saver.wait()
    free = shutil.disk_usage(small_disk).free
    with pytest.raises(SaveError, match="No space left on device; it needs about 4,194,304") as met:
        saver.start(2, shares(2.0, 1 << 20), {}, {})
    assert f"{free:,} are free there" in str(met.value)
    # The numbers alone would fit: it is the thread that meets the end of the disk.
    saver.start(2, shares(2.0, free // 4), {}, {})
    with pytest.raises(SaveError, match="No space left on device"):
        saver.wait()
    assert sorted(path.name for path in (small_disk / "checkpoints").iterdir()) == [
        "latest", "step-00000001",
    ]  # fmt: skip
    # And room that is made again is used.
    saver.start(3, shares(3.0), {}, {})
    saver.wait()
    assert load_checkpoint(small_disk / "checkpoints" / "latest").step == 3


def test_a_second_signal_does_not_wait(tmp_path: Path, slow_disk: threading.Event) -> None:
    saver = Saver(tmp_path, ALONE, keep=2)
    saver.start(5, shares(5.0), {}, {})
    saver.abandon(KeyboardInterrupt())
    assert not slow_disk.is_set()
    assert latest_checkpoint(tmp_path) is None


def test_after_another_error_what_is_in_flight_is_completed(
    tmp_path: Path, slow_disk: threading.Event
) -> None:
    saver = Saver(tmp_path, ALONE, keep=2)
    saver.start(5, shares(5.0), {}, {})
    threading.Timer(0.2, slow_disk.set).start()
    saver.abandon(ValueError("something else"))
    assert load_checkpoint(tmp_path / "checkpoints" / "latest").step == 5
