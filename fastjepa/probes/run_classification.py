"""Classes of videos and images from frozen features: `fastjepa probe knn` and `probe attentive`.

Settings (k, learning rate, weight decay) are chosen on a held-out part of the training files; the
test files are looked at with what was chosen, and with every setting for the table.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastjepa.model import Encoder
from fastjepa.probes.attentive import SETTINGS, Clips, attentive_sweep, share_right
from fastjepa.probes.feature_store import FeatureStore, View, named_by
from fastjepa.probes.knn import KS, accuracy, knn
from fastjepa.probes.labelled_files import ClassFiles, held_out, read_classes
from fastjepa.probes.protocol import candidates, skipped, stores_of, train_heads
from fastjepa.probes.report import Result
from fastjepa.probes.sweep import Samples, Setting


class _Data(NamedTuple):
    store: FeatureStore
    labels_N: Tensor
    files: ClassFiles


def probe_knn(
    encoder: Encoder,
    train: str,
    test: str,
    out: Path,
    view: View,
    *,
    weights: str,
    ks: Sequence[int] = KS,
    temperature: float = 0.07,
    holdout: float = 0.1,
    batch: int = 8,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Result:
    """k-NN on mean features. Writes `out/knn.json`; features are kept in `out/features`.

    Raises ValueError for data, a view or a k that does not fit.
    """
    fit, other = _features(encoder, train, test, out, view, batch, device)
    bank_ND, queries_MD = (
        torch.stack([d.store[i].flatten() for i in d.store.good]).to(device) for d in (fit, other)
    )
    labels_N, labels_M = (d.labels_N[d.store.good].to(device) for d in (fit, other))
    bank, chooses = held_out(len(bank_ND), holdout, seed)
    held = knn(bank_ND[bank], labels_N[bank], bank_ND[chooses], ks=ks, temperature=temperature)
    tested = knn(bank_ND, labels_N, queries_MD, ks=ks, temperature=temperature)
    each_k = [
        {
            "k": k,
            "held_out": accuracy(held[k], labels_N[chooses]),
            "test": accuracy(tested[k], labels_M),
        }
        for k in held
    ]
    best = max(each_k, key=lambda one: one["held_out"])
    result = Result(
        probe="knn",
        weights=weights,
        setup=_setup(view, train, test, holdout=holdout, seed=seed, temperature=temperature),
        scores={"accuracy": float(best["test"])},
        chosen={"k": best["k"]},
        candidates=each_k,
        skipped=skipped(fit.store, other.store),
    )
    result.save(out / "knn.json")
    return result


def probe_attentive(
    encoder: Encoder,
    train: str,
    test: str,
    out: Path,
    view: View,
    *,
    weights: str,
    settings: Sequence[Setting] = SETTINGS,
    epochs: int = 20,
    head_batch: int = 32,
    holdout: float = 0.1,
    batch: int = 8,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Result:
    """The attentive probe. Writes `out/attentive.json`; a killed probe goes on from the last epoch,
    in `out/heads`. Raises ValueError for data or a view that does not fit.
    """
    fit, other = _features(encoder, train, test, out, view, batch, device)
    rows, chooses = held_out(len(fit.store.good), holdout, seed)
    good = torch.tensor(fit.store.good)
    sweep = attentive_sweep(
        encoder.width, len(fit.files.classes), settings=settings, epochs=epochs, batch=head_batch,
        seed=seed, device=device,
    )  # fmt: skip
    name = named_by(fit.store.name, fit.files.labels, fit.files.classes)
    file = out / "heads" / f"attentive-{name}.safetensors"
    train_heads(sweep, _samples(fit, good[rows], device), file, epochs)
    held, tested = (
        _samples(fit, good[chooses], device),
        _samples(other, torch.tensor(other.store.good), device),
    )

    def right_of(samples: Samples[Clips]) -> tuple[int, list[float]]:
        def score(head: nn.Module) -> float:
            return share_right(head, samples, head_batch)

        return sweep.best(score)

    best, on_held = right_of(held)
    _, on_test = right_of(tested)
    result = Result(
        probe="attentive",
        weights=weights,
        setup=_setup(
            view, train, test, holdout=holdout, seed=seed, epochs=epochs, head_batch=head_batch
        ),
        scores={"accuracy": on_test[best]},
        chosen=sweep.settings[best]._asdict(),
        candidates=candidates(sweep.settings, on_held, on_test),
        skipped=skipped(fit.store, other.store),
    )
    result.save(out / "attentive.json")
    return result


def _features(
    encoder: Encoder,
    train: str,
    test: str,
    out: Path,
    view: View,
    batch: int,
    device: torch.device | str,
) -> tuple[_Data, _Data]:
    files = read_classes(train)
    sources = files, read_classes(test, files.classes)
    stores = stores_of(
        encoder, sources[0].paths, sources[1].paths, out / "features", view, noun="file",
        batch=batch, device=device,
    )  # fmt: skip
    fit, other = (
        _Data(store, torch.tensor(source.labels), source)
        for store, source in zip(stores, sources, strict=True)
    )
    return fit, other


def _samples(data: _Data, numbers: Tensor, device: torch.device | str) -> Samples[Clips]:
    """Clips by their place in `numbers`, all of one number of tokens."""

    def fetch(index: Tensor) -> Clips:
        chosen = numbers[index]
        tokens = [data.store[int(i)].flatten(0, 2) for i in chosen]
        return Clips(torch.stack(tokens).float().to(device), data.labels_N[chosen].to(device))

    sizes = {tuple(data.store[int(i)].shape[:3]) for i in numbers}
    if len(sizes) > 1:
        raise ValueError(
            f"attentive: expected files of one kind, videos or images; their features are of the "
            f"grids {', '.join(map(str, sorted(sizes)))}"
        )
    return Samples(len(numbers), fetch)


def _setup(view: View, train: str, test: str, **rest: Any) -> dict[str, Any]:
    return {"train": train, "test": test, **asdict(view), **rest}
