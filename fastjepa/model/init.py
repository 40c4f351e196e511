"""Initial weights: truncated normal of std 0.02, residual projections scaled down with depth
(docs/method.md section 2)."""

from collections.abc import Iterable
from math import sqrt

import torch
from torch import nn

from fastjepa.model.block import Block

STD = 0.02
MODALITY_STD = 1e-6


@torch.no_grad()
def initialise(module: nn.Module, blocks: Iterable[Block]) -> None:
    """Linear and Conv: N(0, 0.02) cut at +-2, bias 0; LayerNorm 1, 0; block i's outputs over
    sqrt(2 i)."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv3d):
            nn.init.trunc_normal_(part.weight, std=STD)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
    for number, block in enumerate(blocks, start=1):
        block.attn.proj.weight.div_(sqrt(2 * number))
        block.mlp.fc2.weight.div_(sqrt(2 * number))


def modality_embedding(width: int) -> nn.Parameter:
    """A learned vector [1, 1, D] added to every token of a modality."""
    return nn.Parameter(torch.randn(1, 1, width) * MODALITY_STD)
