"""A value for every pixel from frozen features: `fastjepa probe segmentation` and `probe depth`.

Pictures go through the image tokenizer. The learning rate and weight decay are chosen on a held-out
part of the training pictures; the test pictures are looked at with what was chosen, and with every
setting for the table.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastjepa.model import Encoder
from fastjepa.probes import linear_depth, linear_segmentation
from fastjepa.probes.confusion import IGNORED, class_ious, mean_iou
from fastjepa.probes.feature_store import View, file_state, named_by
from fastjepa.probes.label_pictures import read_depth, read_mask
from fastjepa.probes.labelled_files import Pairs, held_out, read_pairs
from fastjepa.probes.linear_depth import depth_errors, depth_sweep
from fastjepa.probes.linear_segmentation import count, segmentation_sweep
from fastjepa.probes.patch_linear import Labelled
from fastjepa.probes.protocol import candidates, skipped, stores_of, train_heads
from fastjepa.probes.report import Result
from fastjepa.probes.sweep import Samples, Setting


class _Parts(NamedTuple):
    """Samples to fit on, to choose on, and to test on; the files left out; a name for all this."""

    fit: Samples[Labelled]
    choose: Samples[Labelled]
    test: Samples[Labelled]
    skipped: dict[str, str]
    name: str


def probe_segmentation(
    encoder: Encoder,
    train: str,
    test: str,
    out: Path,
    view: View,
    *,
    weights: str,
    num_classes: int | None = None,
    ignore: int | None = None,
    settings: Sequence[Setting] = linear_segmentation.SETTINGS,
    epochs: int = 10,
    head_batch: int = 16,
    holdout: float = 0.1,
    batch: int = 8,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Result:
    """Linear segmentation, labels in `masks/`. Writes `out/segmentation.json`.

    num_classes: the largest class of the training masks + 1 if None. ignore: a label that is left
    out, beside 255. A killed probe goes on from the last epoch, in `out/heads`. Raises ValueError
    for data or a view that does not fit, such as a mask, which is named, with a label that is no
    class.
    """
    pairs = read_pairs(train, "masks"), read_pairs(test, "masks")

    def read(path: str) -> Tensor:
        mask = read_mask(path)
        return mask if ignore is None else mask.where(mask != ignore, IGNORED)

    classes = _num_classes(pairs, read, num_classes)
    parts = _parts(encoder, pairs, out, view, read, holdout, batch, seed, device)
    sweep = segmentation_sweep(
        encoder.width, classes, settings=settings, epochs=epochs, batch=head_batch, seed=seed,
        device=device,
    )  # fmt: skip
    name = f"segmentation-{parts.name}{'' if ignore is None else f'-{ignore}'}.safetensors"
    file = out / "heads" / name
    train_heads(sweep, parts.fit, file, epochs)
    best, on_held = sweep.best(
        lambda head: mean_iou(count(head, parts.choose, classes, head_batch))
    )
    counts = [count(head, parts.test, classes, head_batch) for head in sweep.heads]
    ious = class_ious(counts[best])
    result = Result(
        probe="segmentation",
        weights=weights,
        setup={"train": train, "test": test, **asdict(view), "classes": classes,
               "ignore": ignore, "epochs": epochs, "head_batch": head_batch, "holdout": holdout,
               "seed": seed},
        scores={"miou": mean_iou(counts[best])},
        chosen=sweep.settings[best]._asdict(),
        candidates=candidates(sweep.settings, on_held, [mean_iou(one) for one in counts]),
        parts={
            f"class {number}": {"iou": float(iou)}
            for number, iou in enumerate(ious) if not iou.isnan()
        },
        skipped=parts.skipped,
    )  # fmt: skip
    result.save(out / "segmentation.json")
    return result


def probe_depth(
    encoder: Encoder,
    train: str,
    test: str,
    out: Path,
    view: View,
    *,
    weights: str,
    low: float = 0.001,
    high: float = 10.0,
    unit: float = 0.001,
    settings: Sequence[Setting] = linear_depth.SETTINGS,
    epochs: int = 10,
    head_batch: int = 16,
    holdout: float = 0.1,
    batch: int = 8,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Result:
    """Linear depth from `low` to `high` metres, labels in `depths/`. Writes `out/depth.json`.

    unit: metres of a label picture's 1. Goes on and raises as `probe_segmentation`.
    """
    pairs = read_pairs(train, "depths"), read_pairs(test, "depths")
    sweep = depth_sweep(
        encoder.width, low, high, settings=settings, epochs=epochs, batch=head_batch, seed=seed,
        device=device,
    )  # fmt: skip

    def read(path: str) -> Tensor:
        return read_depth(path, unit)

    parts = _parts(encoder, pairs, out, view, read, holdout, batch, seed, device)
    name = f"depth-{parts.name}-{low:g}-{high:g}-{unit:g}.safetensors"
    train_heads(sweep, parts.fit, out / "heads" / name, epochs)
    best, on_held = sweep.best(
        lambda head: -depth_errors(head, parts.choose, low, high, head_batch).rmse
    )
    tested = [depth_errors(head, parts.test, low, high, head_batch) for head in sweep.heads]
    result = Result(
        probe="depth",
        weights=weights,
        setup={"train": train, "test": test, **asdict(view), "low": low, "high": high,
               "unit": unit, "epochs": epochs, "head_batch": head_batch, "holdout": holdout,
               "seed": seed},
        scores=tested[best]._asdict(),
        chosen=sweep.settings[best]._asdict(),
        candidates=candidates(
            sweep.settings, [-score for score in on_held], [errors.rmse for errors in tested]
        ),
        skipped=parts.skipped,
    )  # fmt: skip
    result.save(out / "depth.json")
    return result


def _parts(
    encoder: Encoder,
    pairs: tuple[Pairs, Pairs],
    out: Path,
    view: View,
    read: Callable[[str], Tensor],
    holdout: float,
    batch: int,
    seed: int,
    device: torch.device | str,
) -> _Parts:
    stores = stores_of(
        encoder, pairs[0].paths, pairs[1].paths, out / "features", view, noun="picture",
        batch=batch, device=device,
    )  # fmt: skip

    def samples(which: int, numbers: list[int]) -> Samples[Labelled]:
        def fetch(index: Tensor) -> Labelled:
            chosen = [numbers[int(i)] for i in index]
            return Labelled(
                [stores[which][i][0].float().to(device) for i in chosen],
                [read(pairs[which].labels[i]).to(device) for i in chosen],
            )

        return Samples(len(numbers), fetch)

    good = stores[0].good
    fit, choose = held_out(len(good), holdout, seed)
    return _Parts(
        samples(0, [good[i] for i in fit]),
        samples(0, [good[i] for i in choose]),
        samples(1, stores[1].good),
        skipped(*stores),
        named_by(stores[0].name, [file_state(path) for path in pairs[0].labels]),
    )


def _num_classes(
    pairs: tuple[Pairs, Pairs], read: Callable[[str], Tensor], wanted: int | None
) -> int:
    """`wanted`, or one more than the largest class of the training masks; all masks fit in it."""
    spans: list[dict[str, tuple[int, int]]] = [{}, {}]
    for own, part in zip(spans, pairs, strict=True):
        for path in part.labels:
            known = (mask := read(path))[mask != IGNORED]
            if known.numel():
                own[path] = int(known.min()), int(known.max())
    if not spans[0]:
        raise ValueError(f"masks: no pixel of {len(pairs[0].labels)} training masks has a class")
    count = wanted or 1 + max(most for _, most in spans[0].values())
    for path, (least, most) in (spans[0] | spans[1]).items():
        if least < 0 or most >= count:
            raise ValueError(
                f"{path}: label {least if least < 0 else most}; expected classes from 0 to "
                f"{count - 1}, or {IGNORED} for ignored"
            )
    return count
