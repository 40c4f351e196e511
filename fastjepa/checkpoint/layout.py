"""Checkpoint folders: `<run>/checkpoints/step-00000120/` with tensors, state and manifest.

A save goes to a `.tmp-` sibling, is fsynced, and gets its name by a rename, so a folder called
`step-` is whole; the manifest (each file's size and SHA-256) shows later damage. `latest` beside
them is a relative symbolic link, swapped after the rename: a path to type, which still holds when
the run is moved. Nothing here trusts it; the newest is found by name.

    path = save_checkpoint(run, 120, {"encoder": encoder.state_dict()}, {"model": {...}}, keep=3)
    checkpoint = load_checkpoint(latest_checkpoint(run))
"""

import contextlib
import errno
import hashlib
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
from fastjepa.checkpoint.durable import point, sync
from fastjepa.checkpoint.tensor_file import CheckpointError, read_tensors, write_tensors

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

CHECKPOINTS = "checkpoints"
LATEST = "latest"
_MANIFEST = "manifest.json"
_STATE = "state.json"
_TEMPORARY = ".tmp-"
# What the old folder is called while a save of the same step takes its name.
_REPLACED = ".replaced"
_STEP = re.compile(r"step-(\d{8,})(\.replaced)?")


@dataclass(frozen=True)
class Checkpoint:
    """What was saved: `tensors[part][name]` on the CPU, `state` as given, who wrote it."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    versions: dict[str, str]


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, JSON],
    keep: int,
) -> Path:
    """Save a checkpoint of the run in `folder`; returns its folder.

    `tensors` maps a part (`encoder`) to its named tensors, one file each. The newest `keep`
    complete checkpoints stay; older ones are removed once this one is on the disk, as are leftovers
    of killed saves. An existing checkpoint of this step is replaced. Raises CheckpointError when it
    cannot be written: nothing is lost or left behind then.
    """
    if step < 0 or keep < 1:
        raise CheckpointError(f"expected step >= 0 and keep >= 1, got step {step}, keep {keep}")
    reserved = {"step", "versions"} & state.keys()
    if reserved:
        raise CheckpointError(
            f"state: the keys {sorted(reserved)} are written by the checkpoint itself"
        )
    try:
        text = json.dumps({"step": step, "versions": _versions(), **state}, indent=1)
    except TypeError as error:
        raise CheckpointError(f"state of step {step} is not JSON: {error}") from error
    final = folder / CHECKPOINTS / f"step-{step:08d}"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(final.parent)
        _write(final, tensors, text)
        _prune(final, keep)
    except OSError as error:
        raise CheckpointError(_cannot_save(final, tensors, text, error)) from error
    return final


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of the run in `folder`, by step; None when there is none.

    Complete: the manifest is sound and each file has its size. Contents are compared with it by
    `load_checkpoint`.
    """
    return next((path for path in _newest_first(folder / CHECKPOINTS) if is_complete(path)), None)


def load_checkpoint(path: Path, parts: Collection[str] | None = None) -> Checkpoint:
    """Read a checkpoint folder, every file compared with the manifest; `parts` limits it to some.

    Raises CheckpointError that names the missing, truncated or altered file, and the previous sound
    checkpoint.
    """
    path = path.resolve()
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint folder")
    try:
        files = _verified(path, parts)
        record = json.loads((path / _STATE).read_text(encoding="utf-8"))
        step, versions = record.pop("step"), record.pop("versions")
        tensors = {
            name.removesuffix(".safetensors"): read_tensors(path / name)[0]
            for name in files
            if name.endswith(".safetensors")
        }
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_way_out(path)}") from error
    return Checkpoint(path, step, tensors, record, versions)


def is_complete(path: Path) -> bool:
    """Whether `path` is a checkpoint folder with a sound manifest and files of the right sizes."""
    try:
        for name, (size, _) in _read_manifest(path).items():
            _check_size(path / name, size)
    except CheckpointError:
        return False
    return True


def _write(final: Path, tensors: Mapping[str, Mapping[str, Tensor]], text: str) -> None:
    """Write everything under a temporary name, bring it to the disk, and give it its name."""
    temporary = final.with_name(f"{_TEMPORARY}{final.name}-{os.getpid()}")
    try:
        temporary.mkdir()
        for part, named in tensors.items():
            write_tensors(temporary / f"{part}.safetensors", named)
        (temporary / _STATE).write_text(text, encoding="utf-8")
        _write_manifest(temporary)
        for file in temporary.iterdir():
            sync(file)
        sync(temporary)
        _set_aside(final)
        temporary.rename(final)
        sync(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _point_latest(final)


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


def _write_manifest(folder: Path) -> None:
    files = {
        file.name: {"size": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(folder.iterdir())
    }
    manifest = {"files": files, "sha256": _seal(files)}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


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


def _verified(path: Path, parts: Collection[str] | None) -> list[str]:
    """The files of `parts` (all when None), each compared with the manifest."""
    manifest = _read_manifest(path)
    wanted = (
        set(manifest) if parts is None else {_STATE, *(f"{part}.safetensors" for part in parts)}
    )
    absent = sorted(wanted - manifest.keys())
    if absent:
        raise CheckpointError(f"{path}: holds no {', '.join(absent)}; it has {', '.join(manifest)}")
    for name in sorted(wanted):
        size, digest = manifest[name]
        _check_size(path / name, size)
        try:
            found = _sha256(path / name)
        except OSError as error:
            raise CheckpointError(f"{path / name}: cannot be read: {error.strerror}") from error
        if found != digest:
            raise CheckpointError(f"{path / name}: damaged, its SHA-256 is not the manifest's")
    return sorted(wanted)


def _read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    file = path / _MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        files = manifest["files"]
        if _seal(files) != manifest["sha256"] or _STATE not in files:
            raise CheckpointError(f"{file}: damaged, its contents do not match its own SHA-256")
        return {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: missing, so {path} is not a complete checkpoint") from error
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: damaged, not a manifest: {error!r}") from error


def _check_size(file: Path, size: int) -> None:
    try:
        found = file.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{file}: missing ({error.strerror})") from error
    if found != size:
        kind = "truncated" if found < size else "too long"
        raise CheckpointError(f"{file}: {kind}, {found} bytes where the manifest says {size}")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _seal(files: object) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _versions() -> dict[str, str]:
    return {
        "fastjepa": fastjepa.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def _way_out(path: Path) -> str:
    """For an error about `path`: the newest sound checkpoint of a lower step."""
    siblings = _newest_first(path.parent)
    older = siblings[siblings.index(path) + 1 :] if path in siblings else []
    for candidate in older:
        with contextlib.suppress(CheckpointError):
            _verified(candidate, None)
            return (
                f"the previous complete checkpoint is {candidate}: remove {path} to go on from it"
            )
    return "there is no earlier complete checkpoint"


def _cannot_save(
    final: Path, tensors: Mapping[str, Mapping[str, Tensor]], text: str, error: OSError
) -> str:
    needed = len(text) + sum(t.nbytes for named in tensors.values() for t in named.values())
    free = shutil.disk_usage(next(parent for parent in final.parents if parent.exists())).free
    last = latest_checkpoint(final.parent.parent)
    about = (
        f" ({error.filename})" if error.filename and _TEMPORARY not in str(error.filename) else ""
    )
    return (
        f"cannot save {final}: {error.strerror or error}{about}; it needs about {needed:,} bytes, "
        f"{free:,} are free there; "
        + (f"the last complete checkpoint is {last}" if last else "no checkpoint exists yet")
    )
