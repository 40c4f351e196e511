"""Checkpoint folders: whole or absent, checked when read, the last few kept, crash or not."""

import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastjepa.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint, save_checkpoint
from fastjepa.checkpoint.layout import newest_first
from fastjepa.checkpoint.run_folder import check_writable

PARTS = ("encoder", "target_encoder", "predictor", "optimizer", "rng")


def parts(value: float, numbers: int = 8) -> dict[str, dict[str, Tensor]]:
    return {part: {"weight": torch.full((numbers,), float(value))} for part in PARTS}


def save(run: Path, step: int, keep: int = 3, numbers: int = 8) -> Path:
    return save_checkpoint(run, step, parts(step, numbers), {"value": step}, keep)


def steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_a_checkpoint_is_a_folder_of_files_that_its_manifest_lists(tmp_path: Path) -> None:
    path = save(tmp_path, 120)
    assert path == tmp_path / "checkpoints" / "step-00000120"
    files = {f"{part}.safetensors" for part in PARTS} | {"state.json"}
    assert {file.name for file in path.iterdir()} == files | {"manifest.json"}
    manifest = json.loads((path / "manifest.json").read_text())["files"]
    assert manifest.keys() == files
    for name, entry in manifest.items():
        assert entry["size"] == (path / name).stat().st_size
        assert len(entry["sha256"]) == 64
    record = json.loads((path / "state.json").read_text())
    assert record["step"] == 120
    assert record["versions"]["torch"] == str(torch.__version__)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.text().filter(lambda key: key not in {"step", "versions"}), JSON_VALUES, max_size=4
    ),
    st.dictionaries(
        st.text(min_size=1).filter(lambda key: key != "__metadata__"),
        st.floats(width=32),
        max_size=4,
    ),
    st.integers(0, 10**12),
)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_what_is_saved_is_what_is_loaded(
    tmp_path: Path, state: dict[str, object], named: dict[str, float], step: int
) -> None:
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    tensors = {"encoder": {name: torch.tensor([x]) for name, x in named.items()}, "rng": {}}
    path = save_checkpoint(run, step, tensors, state, keep=1)  # type: ignore[arg-type]
    checkpoint = load_checkpoint(path)
    assert (checkpoint.step, checkpoint.state, checkpoint.path) == (step, state, path)
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in tensors["encoder"].items():
        found = checkpoint.tensors["encoder"][name]
        assert torch.equal(found.view(torch.int32), tensor.view(torch.int32))


def test_the_newest_is_found_by_step_and_none_is_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "absent") is None
    assert latest_checkpoint(tmp_path) is None
    for step in (5, 100_000_000, 20):
        save(tmp_path, step)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-100000000"


def test_latest_is_a_link_to_the_last_save_that_survives_moving_the_run(tmp_path: Path) -> None:
    save(tmp_path / "a", 1)
    save(tmp_path / "a", 2)
    (tmp_path / "a").rename(tmp_path / "b")
    link = tmp_path / "b" / "checkpoints" / "latest"
    assert os.readlink(link) == "step-00000002"
    assert load_checkpoint(link).step == 2


def test_the_last_few_are_kept_and_damaged_ones_do_not_count(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, keep=3)
    assert steps(tmp_path) == ["latest", "step-00000003", "step-00000004", "step-00000005"]
    (tmp_path / "checkpoints/step-00000004/encoder.safetensors").unlink()
    save(tmp_path, 6, keep=3)
    assert steps(tmp_path) == ["latest", *(f"step-{step:08d}" for step in (3, 4, 5, 6))]
    save(tmp_path, 7, keep=2)
    assert steps(tmp_path) == ["latest", "step-00000006", "step-00000007"]
    save(tmp_path, 8, keep=1)
    assert steps(tmp_path) == ["latest", "step-00000008"]


def test_the_checkpoint_just_written_is_never_the_one_removed(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    path = save(tmp_path, 5, keep=1)
    assert load_checkpoint(path).state == {"value": 5}
    assert steps(tmp_path) == ["latest", "step-00000005", "step-00000020"]


def test_a_step_saved_again_replaces_the_old_one_sound_or_damaged(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    (path / "rng.safetensors").write_bytes(b"")
    save_checkpoint(tmp_path, 7, parts(70), {"value": 70}, keep=3)
    save_checkpoint(tmp_path, 7, parts(71), {"value": 71}, keep=3)
    assert steps(tmp_path) == ["latest", "step-00000007"]
    assert load_checkpoint(path).state == {"value": 71}


def test_a_save_killed_while_replacing_a_step_leaves_the_old_one_to_be_found(
    tmp_path: Path,
) -> None:
    path = save(tmp_path, 7)
    path.rename(path.with_name("step-00000007.replaced"))
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert load_checkpoint(latest).step == 7
    save(tmp_path, 7)
    assert steps(tmp_path) == ["latest", "step-00000007"]


@pytest.mark.parametrize("damaged", ["none", "step-00000007", "step-00000007.replaced"])
def test_a_save_killed_after_replacing_a_step_does_not_stop_the_next(
    tmp_path: Path, damaged: str
) -> None:
    path = save(tmp_path, 7)
    shutil.copytree(path, path.with_name("step-00000007.replaced"))
    (path.parent / damaged / "rng.safetensors").unlink(missing_ok=True)
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert load_checkpoint(latest).step == 7
    save_checkpoint(tmp_path, 7, parts(70), {"value": 70}, keep=3)
    assert steps(tmp_path) == ["latest", "step-00000007"]
    assert load_checkpoint(path).state == {"value": 70}


def test_leftovers_of_killed_saves_are_ignored_and_cleaned(tmp_path: Path) -> None:
    save(tmp_path, 1)
    home = tmp_path / "checkpoints"
    shutil.copytree(home / "step-00000001", home / ".tmp-step-00000009-123")
    (home / ".tmp-latest-123").symlink_to("step-00000001")
    (home / "step-00000008").mkdir()
    (home / "notes").write_text("mine")
    assert latest_checkpoint(tmp_path) == home / "step-00000001"
    save(tmp_path, 2)
    assert steps(tmp_path) == ["latest", "notes", "step-00000001", "step-00000002", "step-00000008"]


@pytest.mark.parametrize(
    ("step", "keep", "state", "message"),
    [
        (-1, 1, {}, "got step -1"),
        (1, 0, {}, "keep 0"),
        (1, 1, {"step": 3}, r"\['step'\] are written by the checkpoint"),
        (1, 1, {"a": {1, 2}}, "state of step 1 is not JSON: .*set"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_before_anything_is_written(
    tmp_path: Path, step: int, keep: int, state: dict[str, object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path, step, parts(0), state, keep)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


FILES = [*(f"{part}.safetensors" for part in PARTS), "state.json", "manifest.json"]


@given(st.sampled_from(FILES), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_flipped_bit_is_found_and_its_file_named(
    tmp_path: Path, name: str, place: float, bit: int
) -> None:
    path = tmp_path / "checkpoints" / "step-00000004"
    if not path.exists():
        save(tmp_path, 4)
    whole = (path / name).read_bytes()
    damaged = bytearray(whole)
    damaged[int(place * len(whole))] ^= 1 << bit
    (path / name).write_bytes(damaged)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert f"step-00000004/{name}: damaged" in str(caught.value)
    (path / name).write_bytes(whole)
    assert load_checkpoint(path).step == 4


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "missing", "too long"])
def test_a_truncated_or_missing_file_is_named_and_the_previous_checkpoint_offered(
    tmp_path: Path, name: str, damage: str
) -> None:
    first, second, third = (save(tmp_path, step) for step in (1, 2, 3))
    flipped = bytearray((second / "encoder.safetensors").read_bytes())
    flipped[-1] ^= 1
    (second / "encoder.safetensors").write_bytes(flipped)
    if damage == "missing":
        (third / name).unlink()
    else:
        content = (third / name).read_bytes()
        (third / name).write_bytes(content[:-1] if damage == "truncated" else content + b"x")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(third)
    said = str(caught.value)
    assert f"{third / name}: " in said
    assert name == "manifest.json" or f"{name}: {damage}" in said
    # The second is altered too, though no size shows it: the first is the one to offer.
    offer = f"the previous complete checkpoint is {first}: to go on from it, "
    aside, end = said.partition(offer)[2].split(" and give ")
    assert end == "the same command again"
    assert "\n" not in said
    assert latest_checkpoint(tmp_path) == second
    subprocess.run(aside, shell=True, check=True)
    assert newest_first(tmp_path) == [first]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["truncated", "missing"])
def test_every_rank_names_a_damaged_state(tmp_path: Path, rank: int, kind: str) -> None:
    state = save(tmp_path, 1) / "state.json"
    content = state.read_bytes()
    state.unlink()
    if kind == "truncated":
        state.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=rf"state\.json: {kind}"):
        load_checkpoint(state.parent, turn=(rank, 2))


def test_damage_to_the_only_checkpoint_says_that_there_is_no_other(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "state.json").unlink()
    with pytest.raises(CheckpointError, match="there is no earlier complete checkpoint"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        load_checkpoint(tmp_path / "checkpoints" / "step-00000044")


def test_one_part_can_be_read_without_the_others(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "optimizer.safetensors").write_bytes(b"gone")
    assert load_checkpoint(path, parts=["encoder"]).tensors.keys() == {"encoder"}
    with pytest.raises(
        CheckpointError, match="holds no teacher; it has encoder, target_encoder, predictor"
    ):
        load_checkpoint(path, parts=["teacher"])


# Saves from `first` on, in a process of its own; each part, and the state, hold the same number.
SAVE_FOREVER = """
import torch
from fastjepa.checkpoint import save_checkpoint
step = first
while True:
    for value in range(10 * step, 10 * step + times):
        tensors = {part: {"weight": torch.full((64,), float(value))} for part in names}
        save_checkpoint(run, step, tensors, {"value": value}, keep=2)
    step += 1
"""


@pytest.mark.parametrize(
    ("times", "kills"), [(1, 20), (3, 10)], ids=["new steps", "steps replaced"]
)
def test_kill_9_at_any_moment_leaves_a_complete_checkpoint(
    tmp_path: Path, times: int, kills: int
) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastjepa.checkpoint"])
    chance = random.Random(20)
    last, interrupted = -1, 0
    for _ in range(kills):
        scope = {"run": tmp_path, "names": PARTS, "first": last + 1, "times": times}
        child = context.Process(target=exec, args=(SAVE_FOREVER, scope))
        child.start()
        deadline = time.monotonic() + 30
        while (newest := latest_checkpoint(tmp_path)) is None or int(newest.name[5:13]) <= last:
            assert time.monotonic() < deadline, "the child saves nothing"
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
        child.kill()
        child.join()
        interrupted += any(name.startswith(".tmp-step") for name in steps(tmp_path))
        latest = latest_checkpoint(tmp_path)
        assert latest is not None
        checkpoint = load_checkpoint(latest)
        assert checkpoint.step > last
        assert checkpoint.state["value"] // 10 == checkpoint.step
        assert checkpoint.tensors.keys() == set(PARTS)
        for named in checkpoint.tensors.values():
            assert torch.equal(named["weight"], torch.full((64,), float(checkpoint.state["value"])))
        link = tmp_path / "checkpoints" / "latest"
        if times == 1 or link.exists():
            assert load_checkpoint(link).step in {checkpoint.step, checkpoint.step - 1}
        last = checkpoint.step
    assert interrupted, "no kill hit a save"
    save(tmp_path, last + 1, keep=2)
    assert steps(tmp_path) == ["latest", f"step-{last:08d}", f"step-{last + 1:08d}"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "fastjepa-test", str(disk)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount command")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"mounting a tmpfs is not permitted: {error.stderr.splitlines()[0]}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_leaves_the_old_checkpoint_and_says_so(small_disk: Path) -> None:
    old = save(small_disk, 1, numbers=1000)
    before = {file.name: file.read_bytes() for file in old.iterdir()}
    free = shutil.disk_usage(small_disk).free
    with pytest.raises(CheckpointError) as caught:
        save(small_disk, 2, numbers=200_000)
    said = str(caught.value)
    assert f"cannot save {small_disk}/checkpoints/step-00000002: No space left on device" in said
    assert re.search(r"it needs about 4,000,\d\d\d bytes", said)
    assert f"{free:,} are free there" in said
    assert said.endswith(f"the last complete checkpoint is {old}")
    assert steps(small_disk) == ["latest", "step-00000001"]
    assert {file.name: file.read_bytes() for file in old.iterdir()} == before
    assert load_checkpoint(old).step == 1


def test_a_disk_that_fills_up_at_any_file_of_the_save_loses_nothing(small_disk: Path) -> None:
    old = save(small_disk, 1)
    saved = []
    for pages_left in range(13):
        ballast = small_disk / "ballast"
        ballast.write_bytes(b"")
        free = shutil.disk_usage(small_disk).free
        ballast.write_bytes(b"x" * (free - pages_left * os.sysconf("SC_PAGE_SIZE")))
        with contextlib.suppress(CheckpointError):
            save(small_disk, 2)
            saved.append(pages_left)
        assert load_checkpoint(old).step == 1
        left = {"step-00000001", "latest"} | ({"step-00000002"} if pages_left in saved else set())
        assert set(steps(small_disk)) == left
        shutil.rmtree(small_disk / "checkpoints" / "step-00000002", ignore_errors=True)
        ballast.unlink()
    assert saved, "even with much room nothing was saved"
    assert min(saved) >= 5, "the disk was never full"


def test_a_file_size_limit_is_told_like_a_full_disk(tmp_path: Path) -> None:
    program = """
import resource, signal, sys, torch
from pathlib import Path
from fastjepa.checkpoint import CheckpointError, save_checkpoint
run = Path(sys.argv[1])
save_checkpoint(run, 1, {"encoder": {"x": torch.ones(10)}}, {}, 2)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    save_checkpoint(run, 2, {"encoder": {"x": torch.ones(1 << 18)}}, {}, 2)
except CheckpointError as error:
    print(error)
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "step-00000002: File too large; it needs about 1,048," in said
    assert steps(tmp_path) == ["latest", "step-00000001"]


def test_a_read_only_disk_is_one_clear_error(small_disk: Path) -> None:
    save(small_disk, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match="cannot be written: Read-only file system"):
        check_writable(small_disk)
    with pytest.raises(
        CheckpointError, match=r"cannot save .*step-00000002: Read-only file system"
    ):
        save(small_disk, 2)
    assert latest_checkpoint(small_disk) == small_disk / "checkpoints" / "step-00000001"


def test_a_run_folder_below_a_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = tmp_path / "file" / "run"
    with pytest.raises(
        CheckpointError, match=r"run\.folder .*file/run: cannot be written: Not a directory"
    ):
        check_writable(run)
    with pytest.raises(
        CheckpointError, match=r"cannot save .*Not a directory.*no checkpoint exists yet"
    ):
        save(run, 1)
    assert latest_checkpoint(run) is None
