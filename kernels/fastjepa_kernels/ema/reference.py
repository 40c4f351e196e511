"""Exponential moving average, tensor by tensor."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def ema_update(targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float) -> None:
    """`target = m target + (1 - m) source`, in place (docs/method.md section 6)."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(momentum * target + (1.0 - momentum) * source.to(target.dtype))
