"""Linear segmentation: a class for every pixel by one linear map of the frozen patch features.

The logits of the patches are enlarged to the label's size (bilinear) and compared pixel by pixel.
Pictures may be of any sizes, side by side in a batch.

Shapes: H' and W' grid, D channels, C classes, H and W the label's pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from fastjepa.probes.confusion import IGNORED, confusion
from fastjepa.probes.sweep import Samples, Setting, Sweep, grid

SETTINGS = grid((1.5e-3, 8e-4, 5e-4, 8e-5), (0.1, 0.01, 1e-4))


class Labelled(NamedTuple):
    """Pictures of a batch: features float [H', W', D] and a label [H, W] for each."""

    features: Sequence[Tensor]
    labels: Sequence[Tensor]


class PatchLinear(nn.Module):
    """BatchNorm and one linear map of every patch: [H', W', D] each to [C, H', W'] each."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.linear = nn.Linear(width, outputs)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        x_RD = torch.cat([x.flatten(0, 1) for x in features])
        parts = self.linear(self.norm(x_RD)).split([x.shape[0] * x.shape[1] for x in features])
        return [
            part.view(*x.shape[:2], -1).permute(2, 0, 1)
            for part, x in zip(parts, features, strict=True)
        ]


def segmentation_loss(head: nn.Module, batch: Labelled) -> Tensor:
    """Mean cross-entropy over all pixels of the batch that have a class."""
    total = pixels = torch.zeros(())
    for wide_SCHW, labels_SHW in _enlarged(head(batch.features), batch.labels):
        target = labels_SHW.long()
        total = total + cross_entropy(wide_SCHW, target, ignore_index=IGNORED, reduction="sum")
        pixels = pixels + (target != IGNORED).sum()
    return total / pixels.clamp(min=1)


def _enlarged(maps: Sequence[Tensor], labels: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Maps [C, H', W'] at their labels' [H, W] pixels, bilinear; those of one size together."""
    groups: dict[tuple[torch.Size, torch.Size], list[int]] = {}
    for place, (one, label) in enumerate(zip(maps, labels, strict=True)):
        groups.setdefault((one.shape, label.shape), []).append(place)
    for places in groups.values():
        own = torch.stack([labels[i] for i in places])
        stacked = torch.stack([maps[i] for i in places])
        yield interpolate(stacked, own.shape[1:], mode="bilinear", align_corners=False), own


def segmentation_sweep(
    width: int,
    num_classes: int,
    *,
    settings: Sequence[Setting] = SETTINGS,
    epochs: int = 10,
    batch: int = 16,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Sweep[Labelled]:
    """A sweep of heads for features of `width` channels, ready to `train(samples)`."""
    return Sweep(
        lambda: PatchLinear(width, num_classes).to(device),
        settings,
        segmentation_loss,
        epochs=epochs,
        batch=batch,
        seed=seed,
    )


def count(head: nn.Module, samples: Samples[Labelled], num_classes: int, batch: int = 16) -> Tensor:
    """The confusion matrix [C, C] of a head over all samples."""
    counts_CC = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    with torch.inference_mode():
        for index in torch.arange(samples.size).split(batch):
            part = samples.fetch(index)
            for wide_SCHW, labels_SHW in _enlarged(head(part.features), part.labels):
                counts_CC += confusion(wide_SCHW.argmax(1), labels_SHW, num_classes).cpu()
    return counts_CC


def in_memory(features: Tensor, labels: Tensor) -> Samples[Labelled]:
    """Samples from tensors [S, H', W', D] and [S, H, W]."""
    fetch: Callable[[Tensor], Labelled] = lambda index: Labelled(  # noqa: E731
        features[index].unbind(), labels[index].unbind()
    )
    return Samples(len(features), fetch)
