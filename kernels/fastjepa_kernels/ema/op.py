"""Exponential moving average in one pass over each tensor, with a veto that needs no host
synchronisation."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def ema_update(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    momentum: float,
    *,
    veto: Tensor | None = None,
) -> None:
    """`target = m target + (1 - m) source`, in place, read 2 and write 1 (docs/method.md section
    6).

    targets: float32 (m = 0.99925 moves less than a bfloat16 can hold) or float64. sources: the
    same shapes, in the same order. veto: a 0-d tensor, non-zero where nothing may change; stays
    on the device. Raises ValueError for unequal counts or shapes, a half-precision target, or m
    outside [0, 1].
    """
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum: expected a value in [0, 1], got {momentum}")
    if len(targets) != len(sources):
        raise ValueError(f"sources: expected {len(targets)} tensors, got {len(sources)}")
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        if target.shape != source.shape:
            raise ValueError(
                f"sources[{i}]: expected shape {tuple(target.shape)}, got {tuple(source.shape)}"
            )
        if target.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"targets[{i}]: expected float32 or float64, got {target.dtype}")
    if veto is None:
        widened = [s.to(t) for t, s in zip(targets, sources, strict=True)]
        torch._foreach_lerp_(list(targets), widened, 1.0 - momentum)
        return
    share = (veto == 0).double() * (1.0 - momentum)
    for target, source in zip(targets, sources, strict=True):
        target.lerp_(source.to(target), share.to(target.dtype))
