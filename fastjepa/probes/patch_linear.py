"""One linear map of frozen patch features to pixels. Pictures of a batch may be of any sizes.

Shapes: H' and W' grid, D channels, C outputs, H and W the label's pixels, S pictures of one size.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from fastjepa.probes.sweep import Samples


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


def enlarged(maps: Sequence[Tensor], labels: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Maps [C, H', W'] at their labels' pixels, bilinear: [S, C, H, W] with labels [S, H, W]."""
    groups: dict[tuple[torch.Size, torch.Size], list[int]] = {}
    for place, (one, label) in enumerate(zip(maps, labels, strict=True)):
        groups.setdefault((one.shape, label.shape), []).append(place)
    for places in groups.values():
        own = torch.stack([labels[i] for i in places])
        stacked = torch.stack([maps[i] for i in places])
        yield interpolate(stacked, own.shape[1:], mode="bilinear", align_corners=False), own


def in_memory(features: Tensor, labels: Tensor) -> Samples[Labelled]:
    """Samples from tensors [S, H', W', D] and [S, H, W]."""

    def fetch(index: Tensor) -> Labelled:
        return Labelled(features[index].unbind(), labels[index].unbind())

    return Samples(len(features), fetch)
