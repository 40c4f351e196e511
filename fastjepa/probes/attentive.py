"""The attentive probe: a class from all of a clip's frozen features, pooled by a learned query.

Three self-attention blocks, then cross-attention of one query, then a linear map; 20 of them at
once, one for each learning rate and weight decay (the official evaluation's protocol).

Shapes: B clips, N tokens, D channels, C classes.
"""

from collections.abc import Sequence
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastjepa.probes.sweep import Samples, Setting, Sweep, grid

RATES, DECAYS = (5e-3, 3e-3, 1e-3, 3e-4, 1e-4), (0.01, 0.1, 0.4, 0.8)
SETTINGS = grid(RATES, DECAYS)


class Clips(NamedTuple):
    """A batch: features float [B, N, D] and classes int64 [B]."""

    features_BND: Tensor
    classes_B: Tensor


class AttentiveHead(nn.Module):
    """Features [B, N, D] to logits [B, C]. `heads` is lowered to what divides D."""

    def __init__(self, width: int, num_classes: int, blocks: int = 3, heads: int = 16) -> None:
        super().__init__()
        heads = gcd(width, heads)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True,
                norm_first=True,
            )
            for _ in range(blocks)
        )  # fmt: skip
        self.query = nn.Parameter(torch.empty(1, 1, width))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.norm_in, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.classify = nn.Linear(width, num_classes)

    def forward(self, x_BND: Tensor) -> Tensor:
        for block in self.blocks:
            x_BND = block(x_BND)
        x_BND = self.norm_in(x_BND)
        query_B1D = self.query.expand(len(x_BND), -1, -1)
        pooled_B1D = query_B1D + self.attention(query_B1D, x_BND, x_BND, need_weights=False)[0]
        pooled_B1D = pooled_B1D + self.mlp(self.norm_out(pooled_B1D))
        logits_BC: Tensor = self.classify(pooled_B1D[:, 0])
        return logits_BC


def attentive_sweep(
    width: int,
    num_classes: int,
    *,
    settings: Sequence[Setting] = SETTINGS,
    epochs: int = 20,
    batch: int = 32,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Sweep[Clips]:
    """A head a setting for features of `width` channels."""

    def loss(head: nn.Module, clips: Clips) -> Tensor:
        return cross_entropy(head(clips.features_BND), clips.classes_B)

    return Sweep(
        lambda: AttentiveHead(width, num_classes).to(device),
        settings,
        loss,
        epochs=epochs,
        batch=batch,
        seed=seed,
    )


def share_right(head: nn.Module, samples: Samples[Clips], batch: int = 32) -> float:
    """Accuracy of a head over all samples, 0 to 1."""
    right = 0
    with torch.inference_mode():
        for index in torch.arange(samples.size).split(batch):
            x_BND, classes_B = samples.fetch(index)
            right += int((head(x_BND).argmax(1) == classes_B).sum())
    return right / samples.size
