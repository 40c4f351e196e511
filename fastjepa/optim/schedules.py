"""Schedules as pure functions of the step (docs/method.md section 6); `step` counts from 0,
values hold during it."""

from math import cos, pi
from typing import Literal

Shape = Literal["constant", "cosine", "linear"]


def learning_rate(
    step: int, *, shape: Shape, start: float, peak: float, final: float, warmup: int, horizon: int
) -> float:
    """Linear from `start` to `peak` over `warmup` steps, then `shape` down to `final` at `horizon`.

    `constant` stays at `peak`. As in the reference, step s uses the schedule's value at s + 1.
    """
    now = step + 1
    if now < warmup:
        return start + (peak - start) * now / warmup
    if shape == "constant":
        return peak
    progress = min(1.0, (now - warmup) / max(1, horizon - warmup))
    if shape == "linear":
        return peak + (final - peak) * progress
    return final + (peak - final) * 0.5 * (1.0 + cos(pi * progress))


def weight_decay(step: int, *, start: float, final: float | None, horizon: int) -> float:
    """Cosine from `start` to `final` at `horizon`; constant if `final` is None."""
    if final is None:
        return start
    progress = min(1.0, (step + 1) / max(1, horizon))
    return final + (start - final) * 0.5 * (1.0 + cos(pi * progress))


def ema_momentum(step: int, *, start: float, final: float | None, horizon: int) -> float:
    """Linear from `start` to `final` at `horizon`; constant if `final` is None."""
    if final is None:
        return start
    return start + (final - start) * min(1.0, step / max(1, horizon))
