"""Checkpoint folders: `<run>/checkpoints/step-00000120/` with tensors, state and manifest.

A save goes to a `.tmp-` sibling, is fsynced, and gets its name by a rename, so a folder called
`step-` is whole; the manifest (each file's size and SHA-256) shows later damage. `latest` beside
them is a relative symbolic link, swapped after the rename: a path to type, which still holds when
the run is moved. Nothing here trusts it; the newest is found by name.

    path = save_checkpoint(run, 120, {"encoder": encoder.state_dict()}, {"model": {...}}, keep=3)
    checkpoint = load_checkpoint(latest_checkpoint(run))

Ranks take the steps of a save apart: the first one calls `begin` and, when all have written their
shares into that folder, `publish`.
"""

import contextlib
import errno
import json
import os
import platform
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

import fastjepa
from fastjepa.checkpoint.manifest import (
    STATE,
    Manifest,
    Written,
    check_content,
    check_size,
    read_manifest,
    write_manifest,
    write_shares,
)
from fastjepa.checkpoint.pieces import Shares, StoredTensors, whole
from fastjepa.checkpoint.tensor_file import CheckpointError
from fastjepa.durable import point, sync

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

CHECKPOINTS = "checkpoints"
LATEST = "latest"
_TEMPORARY = ".tmp-"
# What the old folder is called while a save of the same step takes its name.
_REPLACED = ".replaced"
_STEP = re.compile(r"step-(\d{8,})(\.replaced)?")


@dataclass(frozen=True)
class Checkpoint:
    """What was saved: `tensors[part][name]`, each read as it is asked for, `state` as given, who
    wrote it."""

    path: Path
    step: int
    tensors: dict[str, StoredTensors]
    state: dict[str, Any]
    versions: dict[str, str]


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, JSON],
    keep: int,
) -> Path:
    """Save a checkpoint of the run in `folder`, here and now; returns its folder.

    `tensors` maps a part (`encoder`) to its named tensors, one file each. The newest `keep`
    complete checkpoints stay; older ones are removed once this one is on the disk, as are leftovers
    of killed saves. An existing checkpoint of this step is replaced. Raises CheckpointError when it
    cannot be written: nothing is lost or left behind then.
    """
    if step < 0 or keep < 1:
        raise CheckpointError(f"expected step >= 0 and keep >= 1, got step {step}, keep {keep}")
    text = state_text(step, state)
    shares = {part: whole(named) for part, named in tensors.items()}
    try:
        temporary = begin(folder, step, num_bytes(shares))
        try:
            return publish(temporary, [write_shares(temporary, shares)], text, keep)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(cannot_save(folder, step, num_bytes(shares), error)) from error


def state_text(step: int, state: Mapping[str, JSON]) -> str:
    """What a checkpoint's state.json holds. Raises CheckpointError for what is not JSON."""
    reserved = {"step", "versions"} & state.keys()
    if reserved:
        raise CheckpointError(
            f"state: the keys {sorted(reserved)} are written by the checkpoint itself"
        )
    try:
        return json.dumps({"step": step, "versions": _versions(), **state}, indent=1)
    except TypeError as error:
        raise CheckpointError(f"state of step {step} is not JSON: {error}") from error


def begin(folder: Path, step: int, needed: int) -> Path:
    """Make the temporary folder that a save is written to, and clear the leftovers of killed ones.

    Raises OSError, also where fewer than `needed` bytes are free: a disk that a checkpoint had
    filled up would fail the run's logs, too.
    """
    final = _final(folder, step)
    final.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(final.parent)
    disk = shutil.disk_usage(final.parent)
    # Some file systems over a network do not say what they hold.
    if disk.total and disk.free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    temporary = final.with_name(f"{_TEMPORARY}{final.name}-{os.getpid()}")
    temporary.mkdir()
    return temporary


def publish(temporary: Path, written: Collection[Written], state: str, keep: int) -> Path:
    """Make a checkpoint of what the ranks have written, and remove those beyond the newest `keep`.

    Returns its folder. Raises OSError; the temporary folder is then still there.
    """
    final = temporary.with_name(temporary.name.removeprefix(_TEMPORARY).rpartition("-")[0])
    write_manifest(temporary, written, state)
    _set_aside(final)
    temporary.rename(final)
    sync(final.parent)
    _point_latest(final)
    _prune(final, keep)
    return final


def num_bytes(shares: Shares) -> int:
    """What the shares take on the disk, about."""
    return sum(piece.data.nbytes for pieces in shares.values() for piece in pieces.values())


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of the run in `folder`, by step; None when there is none.

    Complete: the manifest is sound and each file has its size. Contents are compared with it by
    `load_checkpoint`.
    """
    return next((path for path in newest_first(folder) if is_complete(path)), None)


def newest_first(folder: Path) -> list[Path]:
    """Every checkpoint of the run in `folder`, sound or damaged, by step."""
    return _newest_first(folder / CHECKPOINTS)


def step_of(path: Path) -> int:
    """The step of a checkpoint by the name of its folder."""
    match = _STEP.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def remove_newer(path: Path) -> None:
    """Remove every checkpoint that a run would go on from before it did from `path`.

    Raises OSError.
    """
    siblings = _newest_first(path.parent)
    for newer in siblings[: siblings.index(path)]:
        _remove(newer)


def load_checkpoint(
    path: Path, parts: Collection[str] | None = None, turn: tuple[int, int] = (0, 1)
) -> Checkpoint:
    """Open a checkpoint folder, every file compared with the manifest; `parts` limits it to some.

    `turn` (r, R): R ranks open it together, and this one, r, compares every R-th file, and the
    state, which all read. Raises CheckpointError that names the missing, truncated or altered file,
    and the previous sound checkpoint.
    """
    path = path.resolve()
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint folder")
    try:
        manifest = _verified(path, parts, turn)
        record = json.loads((path / STATE).read_text(encoding="utf-8"))
        step, versions = record.pop("step"), record.pop("versions")
        names = manifest.parts() if parts is None else parts
        tensors = {part: manifest.tensors(path, part) for part in names}
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_way_out(path)}") from error
    return Checkpoint(path, step, tensors, record, versions)


def is_complete(path: Path) -> bool:
    """Whether `path` is a checkpoint folder with a sound manifest and files of the right sizes."""
    try:
        for name, (size, _) in read_manifest(path).files.items():
            check_size(path / name, size)
    except CheckpointError:
        return False
    return True


def _final(folder: Path, step: int) -> Path:
    return folder / CHECKPOINTS / f"step-{step:08d}"


def _set_aside(final: Path) -> None:
    """Free the name of an older save of this step, which stays a checkpoint under another."""
    aside = final.with_name(f"{final.name}{_REPLACED}")
    if final.exists() and aside.exists():
        _remove(aside if is_complete(final) else final)
    if final.exists():
        final.rename(aside)


def _point_latest(final: Path) -> None:
    try:
        point(final.parent / LATEST, final.name)
    except OSError as error:
        # Some file systems know no symbolic links; resuming does not need this one.
        if error.errno not in {errno.EPERM, errno.ENOTSUP, errno.ENOSYS}:
            raise


def _prune(final: Path, keep: int) -> None:
    """Remove what is older than the newest `keep` complete checkpoints; never `final`."""
    siblings = _newest_first(final.parent)
    complete = [path for path in siblings if is_complete(path)]
    replaced = [path for path in siblings if path.suffix and path.with_suffix("") in complete]
    oldest = [path for path in complete if path not in replaced][:keep][-1]
    older = siblings[siblings.index(oldest) + 1 :]
    for path in dict.fromkeys(replaced + older):
        if path != final:
            _remove(path)


def _remove(folder: Path) -> None:
    """Remove a folder so that, if killed on the way, no half of it passes for a checkpoint."""
    gone = folder.with_name(f"{_TEMPORARY}old-{folder.name}-{os.getpid()}")
    folder.rename(gone)
    shutil.rmtree(gone)


def _remove_leftovers(home: Path) -> None:
    for leftover in home.glob(f"{_TEMPORARY}*"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def _newest_first(home: Path) -> list[Path]:
    found: list[tuple[int, bool, Path]] = []
    try:
        for path in home.iterdir():
            if match := _STEP.fullmatch(path.name):
                found.append((int(match[1]), match[2] is None, path))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{home}: cannot be read: {error.strerror}") from error
    return [path for _, _, path in sorted(found, reverse=True)]


def _verified(path: Path, parts: Collection[str] | None, turn: tuple[int, int]) -> Manifest:
    """The manifest, with which the files of `parts` (all when None) have been compared."""
    manifest = read_manifest(path)
    known = manifest.parts()
    absent = sorted(set(parts or ()) - set(known))
    if absent:
        raise CheckpointError(f"{path}: holds no {', '.join(absent)}; it has {', '.join(known)}")
    names = sorted(manifest.files if parts is None else manifest.files_of(parts))
    rank, ranks = turn
    for name in dict.fromkeys((STATE, *names[rank::ranks])):
        check_content(path / name, *manifest.files[name])
    return manifest


def _versions() -> dict[str, str]:
    return {
        "fastjepa": fastjepa.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def _way_out(path: Path) -> str:
    """For an error about `path`: the newest sound checkpoint of a lower step."""
    siblings = _newest_first(path.parent)
    place = siblings.index(path) if path in siblings else len(siblings)
    for number, candidate in enumerate(siblings[place + 1 :], start=place + 1):
        with contextlib.suppress(CheckpointError):
            _verified(candidate, None, (0, 1))
            # A run goes on from its newest.
            aside = " && ".join(f"mv {newer} {newer}.damaged" for newer in siblings[:number])
            return (
                f"the previous complete checkpoint is {candidate}: to go on from it, {aside} "
                "and give the same command again"
            )
    return "there is no earlier complete checkpoint"


def cannot_save(folder: Path, step: int, needed: int, error: OSError) -> str:
    """What to say when the checkpoint of a step, of `needed` bytes, cannot be written."""
    final = _final(folder, step)
    free = shutil.disk_usage(next(parent for parent in final.parents if parent.exists())).free
    last = latest_checkpoint(folder)
    about = (
        f" ({error.filename})" if error.filename and _TEMPORARY not in str(error.filename) else ""
    )
    return (
        f"cannot save {final}: {error.strerror or error}{about}; it needs about {needed:,} bytes, "
        f"{free:,} are free there; "
        + (f"the last complete checkpoint is {last}" if last else "no checkpoint exists yet")
    )
