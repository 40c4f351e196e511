"""Linear depth: metres for every pixel from one linear map of the frozen patch features to bins.

A patch's depth is the mean of evenly spaced bins, weighed by the map's outputs (negative ones count
as 0); it is enlarged to the label's size. The loss is scale-invariant in log depth.

Shapes: H and W pixels, S pictures of one size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastjepa.probes.patch_linear import Labelled, PatchLinear, enlarged
from fastjepa.probes.sweep import Samples, Setting, Sweep, grid

RATES, DECAYS = (1.5e-3, 8e-4, 3e-4, 1e-4, 3e-5), (1e-3, 1e-4)
SETTINGS = grid(RATES, DECAYS)
BINS = 256


class DepthErrors(NamedTuple):
    """Each the mean over the pictures: `rmse` in metres, `abs_rel` relative, `delta1` the share of
    pixels within a factor of 1.25."""

    rmse: float
    abs_rel: float
    delta1: float


class DepthHead(nn.Module):
    """Features [H', W', D] each to depth [1, H', W'] each, between `low` and `high` metres."""

    def __init__(self, width: int, low: float, high: float, bins: int = BINS) -> None:
        super().__init__()
        self.patches = PatchLinear(width, bins)
        self.register_buffer("centres", torch.linspace(low, high, bins), persistent=False)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [self._depth(logits) for logits in self.patches(features)]

    def _depth(self, logits_CHW: Tensor) -> Tensor:
        weight_CHW = logits_CHW.relu() + 0.1
        centres_C = self.centres
        assert isinstance(centres_C, Tensor)
        mean_HW = torch.einsum("chw,c->hw", weight_CHW, centres_C) / weight_CHW.sum(0)
        return mean_HW[None]


def depth_sweep(
    width: int,
    low: float,
    high: float,
    *,
    settings: Sequence[Setting] = SETTINGS,
    epochs: int = 10,
    batch: int = 16,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Sweep[Labelled]:
    """A head a setting; labels are metres, those outside of low..high (0: unknown) left out.

    ValueError unless 0 < low < high.
    """
    if not 0.0 < low < high:
        raise ValueError(f"depth: expected 0 < low < high, found {low} and {high}")
    return Sweep(
        lambda: DepthHead(width, low, high).to(device),
        settings,
        lambda head, batch: depth_loss(head, batch, low, high),
        epochs=epochs,
        batch=batch,
        seed=seed,
    )


def depth_loss(head: nn.Module, batch: Labelled, low: float, high: float) -> Tensor:
    """sqrt(var(g) + 0.15 mean(g)^2) of the batch's log ratios g of found and true depth."""
    ratios = []
    for depth_S1HW, labels_SHW in enlarged(head(batch.features), batch.labels):
        known = (labels_SHW >= low) & (labels_SHW <= high)
        ratios.append(depth_S1HW[:, 0][known].log() - labels_SHW[known].log())
    g = torch.cat(ratios)
    if g.numel() < 2:
        return g.sum()  # nothing to learn from: 0, with a gradient
    return (g.var(correction=0) + 0.15 * g.mean().square() + 1e-8).sqrt()


def depth_errors(
    head: nn.Module, samples: Samples[Labelled], low: float, high: float, batch: int = 16
) -> DepthErrors:
    """Errors over all samples. Raises ValueError when no pixel has a depth from low to high."""
    errors: list[Tensor] = []
    with torch.inference_mode():
        for index in torch.arange(samples.size).split(batch):
            part = samples.fetch(index)
            for depth_S1HW, labels_SHW in enlarged(head(part.features), part.labels):
                for found, true in zip(depth_S1HW[:, 0], labels_SHW, strict=True):
                    known = (true >= low) & (true <= high)
                    if known.any():
                        errors.append(_errors(found[known].double(), true[known].double()))
    if not errors:
        raise ValueError(f"depth: no pixel of the labels is from {low} to {high} metres")
    return DepthErrors(*torch.stack(errors).mean(0).tolist())


def _errors(found: Tensor, true: Tensor) -> Tensor:
    difference, ratio = found - true, found / true
    near = torch.maximum(ratio, 1 / ratio) < 1.25
    return torch.stack(
        [difference.square().mean().sqrt(), (difference.abs() / true).mean(), near.double().mean()]
    )
