"""Bytes of weights, gradients, moments and the target on one rank, by the way they are laid out.

`torch` is one process: everything in float32, the target among it, and bf16 copies of the weights
where autocast makes and keeps them. `zero0` to `zero3` are DeepSpeed's ZeRO stages: weights,
gradients and the target in the working dtype, and in float32 a master copy, two moments and the
EMA that the target is cast from. A stage says which kinds are split over the ranks.
docs/planning.md has the table.
"""

from dataclasses import dataclass, fields
from typing import Literal, get_args

Layout = Literal["torch", "zero0", "zero1", "zero2", "zero3"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

_BF16, _FLOAT32 = 2, 4
# From which ZeRO stage on a kind is split over the ranks.
_SPLIT_FROM = {"master": 1, "moments": 1, "ema": 1, "gradients": 2, "weights": 3, "target": 3}

_OFFLOADED = ("master", "moments", "ema")


@dataclass(frozen=True)
class StateBytes:
    """Bytes on one rank by kind; `ema` is the float32 target, `target` its working copy, `casts`
    are autocast's bf16 copies of the trained weights, `teacher` a frozen encoder that gives the
    targets, whole on every rank. `host` are those of all that offloading moves
    to the host's memory, and which are not counted among the kinds."""

    weights: int
    casts: int
    gradients: int
    master: int
    moments: int
    ema: int
    target: int
    teacher: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """Bytes on the GPU."""
        every: list[int] = [getattr(self, field.name) for field in fields(self)]
        return sum(every) - self.host


def state_bytes(
    encoder: int,
    predictor: int,
    *,
    layout: Layout,
    ranks: int = 1,
    value_bytes: int = _BF16,
    offload: bool = False,
    teacher: int = 0,
    by_hand: bool = True,
) -> StateBytes:
    """Bytes per rank for so many parameters of the encoder, the predictor and a frozen teacher.

    `value_bytes` is 2 for products in bf16 and 4 for float32. In layout `torch` autocast keeps
    copies of the weights for the backward, but not where blocks run `by_hand`. `offload` moves
    ZeRO's masters, moments and EMA to the host. Shards are padded to one size. Raises ValueError
    for less than one rank.
    """
    if ranks < 1:
        raise ValueError(f"ranks: expected at least 1, got {ranks}")
    trained = encoder + predictor
    if layout == "torch":
        return StateBytes(
            weights=_FLOAT32 * trained,
            casts=value_bytes * trained if value_bytes < _FLOAT32 and not by_hand else 0,
            gradients=_FLOAT32 * trained,
            master=0,
            moments=2 * _FLOAT32 * trained,
            ema=_FLOAT32 * encoder,
            target=0,
            teacher=_FLOAT32 * teacher,
        )
    whole = {
        "weights": value_bytes * trained,
        "gradients": value_bytes * trained,
        "master": _FLOAT32 * trained,
        "moments": 2 * _FLOAT32 * trained,
        "ema": _FLOAT32 * encoder,
        "target": value_bytes * encoder,
    }
    stage = int(layout[-1])
    parts = {
        kind: -(-size // ranks) if stage >= _SPLIT_FROM[kind] else size
        for kind, size in whole.items()
    }
    host = sum(parts.pop(kind) for kind in _OFFLOADED) if offload else 0
    kept = dict.fromkeys(_OFFLOADED, 0) | parts
    return StateBytes(casts=0, teacher=value_bytes * teacher, host=host, **kept)
