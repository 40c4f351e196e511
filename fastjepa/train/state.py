"""A run's state to and from a checkpoint: weights, moments, EMA, guard, random numbers."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from fastjepa.checkpoint import (
    Checkpoint,
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    pack_rng,
    read_networks,
    read_official,
    unpack_rng,
)
from fastjepa.checkpoint.layout import newest_first
from fastjepa.checkpoint.pieces import host_copy, wait_for_copies, whole
from fastjepa.train.engine import Engine
from fastjepa.train.guard import LossGuard
from fastjepa.train.ranks import Ranks, RanksError
from fastjepa.train.saver import Saver

InitWith = Literal["weights", "optimizer", "average"]
WEIGHTS = ("encoder", "predictor", "target_encoder")
ENGINE = (*WEIGHTS, "optimizer")


class DamagedError(CheckpointError, RanksError):
    """A rank has found a checkpoint damaged; every rank raises it."""


def save(
    saver: Saver, step: int, engine: Engine, guard: LossGuard, facts: Mapping[str, Any]
) -> None:
    """Copy the state after `step` finished steps and begin to write it; all ranks call it.

    `facts` (model sizes, ...) go into the checkpoint's state. The same tensors whatever the engine:
    any number of ranks can go on from them.
    """
    saver.wait()
    shares = engine.snapshot()
    alone = {
        "guard": {name: host_copy(tensor) for name, tensor in guard.state().items()},
        "rng": pack_rng(),
    }
    wait_for_copies(engine.device)
    saver.start(step, shares, {part: whole(tensors) for part, tensors in alone.items()}, facts)


def resume(folder: Path, engine: Engine, guard: LossGuard) -> Checkpoint | None:
    """Restore the newest checkpoint of `folder`, all ranks together; None if there is none.

    Raises CheckpointError (a ValueError) naming a damaged file or what does not fit, before
    anything is changed, and RanksError where ranks see other checkpoints.
    """
    path = next(iter(newest_first(folder)), None)
    ranks = engine.ranks
    ranks.check_same({"the newest checkpoint": "none" if path is None else path.name})
    return None if path is None else restore(path, engine, guard)


def restore(path: Path, engine: Engine, guard: LossGuard) -> Checkpoint:
    """Restore one checkpoint, all ranks together; raises as `resume` does."""
    checkpoint = open_together(path, engine.ranks)
    engine.load({name: checkpoint.tensors[name] for name in ENGINE}, str(path))
    guard.load(dict(checkpoint.tensors["guard"]))
    unpack_rng(checkpoint.tensors["rng"])
    return checkpoint


def open_together(path: Path, ranks: Ranks, parts: Collection[str] | None = None) -> Checkpoint:
    """A checkpoint whose files the ranks have compared with its manifest, each some of them.

    Raises DamagedError on all ranks.
    """
    checkpoint, told = None, None
    try:
        checkpoint = load_checkpoint(path, parts, turn=(ranks.rank, ranks.size))
    except CheckpointError as error:
        told = str(error)
    failures = [failure for failure in ranks.gather(told) if failure is not None]
    if failures:
        raise DamagedError(failures[0])
    assert checkpoint is not None
    return checkpoint


def check_samples(checkpoint: Checkpoint, samples_per_step: Mapping[str, float]) -> None:
    """Raise CheckpointError where a step takes other numbers of samples than the run's steps did.

    The place in the data is steps x samples a step: it would jump back or ahead.
    """
    before: Mapping[str, float] = checkpoint.state["samples_per_step"]
    for stream, now in samples_per_step.items():
        if now != before.get(stream):
            raise CheckpointError(
                f"{checkpoint.path}: a step took {before.get(stream, 0)} samples of {stream} and "
                f"would take {now}, so that data would be repeated or left out; batch x "
                "optim.accumulate x ranks must stay the same (half the ranks, twice the "
                "optim.accumulate)"
            )


def load_initial(path: Path, engine: Engine, init_with: InitWith = "weights") -> tuple[str, ...]:
    """Start from the weights at `path`: a run folder, a checkpoint, an official .pt or an
    exported encoder.

    Always strict. `init_with` optimizer takes AdamW's moments too, which our own checkpoints hold;
    average starts the encoder from the averaged one. Returns the parts that were loaded: a file
    without a predictor leaves ours as initialised. Raises CheckpointError naming each key that does
    not fit.
    """
    moments = init_with == "optimizer"
    if moments and not path.is_dir():
        raise CheckpointError(
            f"train.init_from {path}: no run folder and no checkpoint, so it holds no moments for "
            "train.init_with optimizer; weights or average fits"
        )
    loaded: dict[str, Mapping[str, Tensor]] = {}
    if path.is_dir():
        parts = ENGINE if moments else WEIGHTS
        loaded |= open_together(latest_checkpoint(path) or path, engine.ranks, parts).tensors
    elif path.suffix in (".pt", ".pth", ".tar"):
        target, predictor, info = read_official(path)
        loaded = {"target_encoder": target, "encoder": target}
        if "encoder" in info.parts and info.part != "encoder":
            loaded["encoder"] = read_official(path, part="encoder")[0]
        if predictor is not None:
            loaded["predictor"] = predictor
    else:
        networks, found = read_networks(path)
        loaded = {"target_encoder": found.tensors, "encoder": found.tensors}
        if "predictor" in networks:
            loaded["predictor"] = networks["predictor"]
    if init_with == "average":
        loaded["encoder"] = loaded["target_encoder"]
    engine.load(loaded, f"train.init_from {path}")
    return tuple(loaded)
