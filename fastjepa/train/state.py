"""A run's state to and from a checkpoint: weights, moments, EMA, guard, random numbers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fastjepa.checkpoint import (
    Checkpoint,
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    pack_rng,
    read_encoder,
    read_official,
    save_checkpoint,
    unpack_rng,
)
from fastjepa.train.engine import Engine
from fastjepa.train.guard import LossGuard

InitWith = Literal["weights", "optimizer", "average"]
WEIGHTS = ("encoder", "predictor", "target_encoder")
ENGINE = (*WEIGHTS, "optimizer")


def save(
    folder: Path, step: int, engine: Engine, guard: LossGuard, facts: dict[str, Any], keep: int
) -> None:
    """Write a checkpoint of `step` finished steps; `facts` (model sizes, ...) go into its state.

    All ranks call it and the first one writes, the same files whatever the engine: any number of
    ranks can go on from them.
    """
    parts = engine.state()
    if engine.ranks.first:
        tensors = {**parts, "guard": guard.state(), "rng": pack_rng()}
        save_checkpoint(folder, step, tensors, facts, keep)


def resume(folder: Path, engine: Engine, guard: LossGuard) -> Checkpoint | None:
    """Restore the newest complete checkpoint of `folder`; None if there is none.

    Raises CheckpointError (a ValueError) naming what does not fit, before anything is changed.
    """
    path = latest_checkpoint(folder)
    if path is None:
        return None
    checkpoint = load_checkpoint(path)
    engine.load({name: checkpoint.tensors[name] for name in ENGINE}, str(path))
    guard.load(checkpoint.tensors["guard"])
    unpack_rng(checkpoint.tensors["rng"])
    return checkpoint


def check_samples(checkpoint: Checkpoint, samples_per_step: Mapping[str, int]) -> None:
    """Raise CheckpointError where a step takes other numbers of samples than the run's steps did.

    The place in the data is steps x samples a step: it would jump back or ahead.
    """
    before: Mapping[str, int] = checkpoint.state["samples_per_step"]
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
    if path.is_dir():
        parts = ENGINE if moments else WEIGHTS
        loaded = load_checkpoint(latest_checkpoint(path) or path, parts=parts).tensors
    elif path.suffix in (".pt", ".pth", ".tar"):
        target, predictor, info = read_official(path)
        loaded = {"target_encoder": target, "encoder": target}
        if "encoder" in info.parts and info.part != "encoder":
            loaded["encoder"] = read_official(path, part="encoder")[0]
        if predictor is not None:
            loaded["predictor"] = predictor
    else:
        encoder = read_encoder(path).tensors
        loaded = {"target_encoder": encoder, "encoder": encoder}
    if init_with == "average":
        loaded["encoder"] = loaded["target_encoder"]
    engine.load(loaded, f"train.init_from {path}")
    return tuple(loaded)
