"""A run's folder belongs to one recipe; taking it for a run, and whether it can be written."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fastjepa.checkpoint.layout import latest_checkpoint, newest_first
from fastjepa.checkpoint.tensor_file import CheckpointError
from fastjepa.durable import write_text

RECIPE = "recipe.yaml"
_FINGERPRINT = "# fingerprint: "

# Keys that a run may change on the way: none of them changes what a step computes, but for the
# order in which sums are taken. (Accumulation makes up for other ranks: a checkpoint knows how many
# samples a step has to take.)
_FREE_KEYS = frozenset(
    {
        "run.folder",
        "model.checkpointing",
        "model.keep_attention",
        "train.steps",
        "train.log_every",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "data.workers",
        "data.prefetch",
        "data.pin_memory",
        "engine.threads",
        "optim.accumulate",
        "guard.max_skips",
        "guard.return_after",
        "guard.max_returns",
        "engine.kind",
        "engine.adamw",
        "engine.mask_groups",
        "engine.micro_batches",
        "engine.zero_stage",
        "engine.offload",
        "engine.timeout",
        "engine.heartbeat",
    }
)
_FREE_SECTIONS = ("data.cache.", "evaluate.", "observe.", "profile.")
_ABSENT = "absent"


def check_writable(folder: Path) -> None:
    """Create `folder` if needed and try to write a file there. Raises CheckpointError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"fastjepa")
    except OSError as error:
        raise CheckpointError(
            f"run.folder {folder}: cannot be written: {error.strerror} ({error.filename or folder})"
        ) from error


def claim_run_folder(folder: Path, recipe_fingerprint: str, recipe_yaml: str) -> tuple[str, ...]:
    """Take `folder` for a run of this recipe: recorded in a new folder, compared in an old one.

    Returns the dotted keys that differ from the recorded recipe but do not change what a step
    computes (a longer `train.steps`, other `data.workers`); the new recipe is then recorded in its
    place. Raises CheckpointError: another recipe's folder (names each key and both values),
    checkpoints of an unknown recipe, a folder that cannot be written.
    """
    check_writable(folder)
    try:
        recorded = (folder / RECIPE).read_text(encoding="utf-8")
    except FileNotFoundError:
        if latest := latest_checkpoint(folder):
            raise CheckpointError(
                f"run.folder {folder}: holds {latest.name} but no {RECIPE} to compare with; "
                "choose another run.folder"
            ) from None
        _record(folder, recipe_fingerprint, recipe_yaml)
        return ()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / RECIPE}: cannot be read: {error}") from error
    there, here = _keys(recorded, f"{folder / RECIPE}"), _keys(recipe_yaml, "the new recipe")
    differing = [key for key in here | there if here.get(key, _ABSENT) != there.get(key, _ABSENT)]
    binding = [key for key in differing if not _is_free(key)]
    if binding:
        told = ", ".join(
            f"{key} ({there.get(key, _ABSENT)} there, {here.get(key, _ABSENT)} now)"
            for key in binding
        )
        raise CheckpointError(
            f"run.folder {folder} belongs to another recipe: {told}; choose another run.folder"
        )
    fingerprint = recorded.partition("\n")[0].removeprefix(_FINGERPRINT)
    if not differing and fingerprint != recipe_fingerprint:
        raise CheckpointError(
            f"run.folder {folder}: {RECIPE} has fingerprint {fingerprint!r}, the same recipe "
            f"now {recipe_fingerprint!r}: edited, or of another version; choose another run.folder"
        )
    _record(folder, recipe_fingerprint, recipe_yaml)
    return tuple(differing)


@contextmanager
def given_back_unused(folder: Path, recipe_yaml: str) -> Iterator[None]:
    """Where the block fails before its run has logged a step, `folder` is free again: what was to
    be changed in the recipe may then be changed."""
    try:
        yield
    except BaseException:
        if not _is_used(folder) and _recorded_text(folder) == recipe_yaml:
            (folder / RECIPE).unlink()
        raise


def _is_used(folder: Path) -> bool:
    metrics = folder / "metrics.jsonl"
    return bool(newest_first(folder)) or (metrics.exists() and metrics.stat().st_size > 0)


def _recorded_text(folder: Path) -> str | None:
    """The recipe that `folder` was taken for; None where there is none to be read."""
    try:
        return (folder / RECIPE).read_text(encoding="utf-8").partition("\n")[2]
    except (OSError, UnicodeDecodeError):
        return None


def _record(folder: Path, fingerprint: str, text: str) -> None:
    try:
        write_text(folder / RECIPE, f"{_FINGERPRINT}{fingerprint}\n{text}")
    except OSError as error:
        raise CheckpointError(
            f"run.folder {folder}: cannot be written: {error.strerror}"
        ) from error


def _is_free(key: str) -> bool:
    return key in _FREE_KEYS or key.startswith(_FREE_SECTIONS)


def _keys(text: str, where: str) -> dict[str, Any]:
    """A recipe's values by dotted key; lists are values."""
    try:
        tree = OmegaConf.to_container(OmegaConf.create(text))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise CheckpointError(f"{where}: not a recipe: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise CheckpointError(
            f"{where}: not a recipe: expected keys and values, found {type(tree).__name__}"
        )
    return _flat(tree, "")


def _flat(tree: dict[Any, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return flat
