"""What probes with training and test files share: features taken of both, heads trained on the one,
settings compared."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastjepa.model import Encoder
from fastjepa.probes.feature_store import FeatureStore, View, weights_digest
from fastjepa.probes.report import progress
from fastjepa.probes.sweep import Samples, Setting, Sweep

T = TypeVar("T")


def stores_of(
    encoder: Encoder,
    training: Sequence[str],
    test: Sequence[str],
    folder: Path,
    view: View,
    *,
    noun: str,
    batch: int,
    device: torch.device | str,
) -> tuple[FeatureStore, FeatureStore]:
    """Features of the training and of the test files, kept in `folder`; `noun` is what a file is
    called.

    Moves the encoder to `device`. Raises ValueError for a view that does not fit, and where no
    file of one kind can be read.
    """
    view.check(encoder)
    digest = weights_digest(encoder)
    encoder.to(device)

    def filled(name: str, paths: Sequence[str]) -> FeatureStore:
        store = FeatureStore(folder, paths, view, digest)
        with progress(f"features, {name} {noun}s", len(paths)) as advance:
            store.fill(encoder, batch=batch, device=device, advance=advance)
        if not store.good:
            raise ValueError(f"no {name} {noun} can be read: {next(iter(store.bad.values()))}")
        return store

    return filled("training", training), filled("test", test)


def skipped(*stores: FeatureStore) -> dict[str, str]:
    """Files that have no features, each with the reason."""
    return {store.paths[number]: why for store in stores for number, why in store.bad.items()}


def train_heads(sweep: Sweep[T], samples: Samples[T], file: Path, epochs: int) -> None:
    """Train all `epochs`, with a bar; a killed probe goes on from the last epoch in `file`."""
    with progress("training heads", epochs) as advance:
        sweep.train(samples, file=file, say=lambda epoch, losses: advance())


def candidates(
    settings: Sequence[Setting], held_out: Sequence[float], test: Sequence[float]
) -> list[dict[str, Any]]:
    """Each setting with its scores on held-out training files and on test files."""
    return [
        {**setting._asdict(), "held_out": held, "test": tested}
        for setting, held, tested in zip(settings, held_out, test, strict=True)
    ]
