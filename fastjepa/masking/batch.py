"""The masks of a batch as the training step wants them: index sets and distance weights.

Made in the data workers: nothing here needs the model, and the weights depend on the masks alone.

Shapes: B batch, N grid tokens, K kept tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastjepa.masking.blocks import Blocks, Grid, covered
from fastjepa_kernels import mask_distance


@dataclass(frozen=True)
class Masks:
    """Index sets of each mask group, ascending int64: `context` [B, Kc], `predict` [B, Kp].

    `weights` [B, Kc] float32 are the distance weights of the context tokens; None means 1. `clips`
    says with which clip of the batch the index sets start, None with the first. Exact masks have
    index sets of one clip alone, [1, K]: all clips of the first group, then all of the next.
    """

    context: tuple[Tensor, ...]
    predict: tuple[Tensor, ...]
    weights: tuple[Tensor, ...] | None
    clips: tuple[int, ...] | None = None

    def by_group(self) -> "list[Masks]":
        """The masks of each group alone, where all clips have some."""
        size = 1 if self.clips is None else max(self.clips) + 1
        parts = [slice(low, low + size) for low in range(0, len(self.context), size)]
        return [
            Masks(
                self.context[part],
                self.predict[part],
                None if self.weights is None else self.weights[part],
                None if self.clips is None else self.clips[part],
            )
            for part in parts
        ]

    @property
    def sequences(self) -> int:
        """Sequences that the context encoder and the predictor run: one a clip and group."""
        return sum(map(len, self.context))

    def halves(self) -> "list[Masks]":
        """One group's masks of half its clips, then of the others; of one clip, all."""
        cut = (self.sequences + 1) // 2

        def part(of: slice, clips: tuple[int, ...]) -> Masks:
            def chosen(sets: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                return tuple(index[of] for index in sets) if self.clips is None else sets[of]

            weights = None if self.weights is None else chosen(self.weights)
            return Masks(chosen(self.context), chosen(self.predict), weights, clips)

        first, others = slice(cut), slice(cut, None)
        if self.sequences == 1:
            return [self]
        if self.clips is None:
            return [part(first, (0,)), part(others, (cut,))]
        return [part(half, self.clips[half]) for half in (first, others)]

    def to(self, device: torch.device) -> "Masks":
        def move(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(t.to(device, non_blocking=True) for t in tensors)

        weights = None if self.weights is None else move(self.weights)
        return Masks(move(self.context), move(self.predict), weights, self.clips)


def distance_weights(
    context_BK: Tensor, predict_BK: Tensor, grid: Grid, *, offset: bool = False
) -> Tensor:
    """`1 / sqrt(d)`, d the distance to the nearest predicted token in grid units: [B, Kc] float32.

    With `offset`, d is divided by `max(1, grid side // 16)` first (docs/method.md section 5; the
    reference divides by zero below 16).
    """
    distance = mask_distance(context_BK, predict_BK, grid)
    if offset:
        distance = distance / max(1, grid[1] // 16)
    return distance.rsqrt()


@dataclass(frozen=True)
class MaskMaker:
    """Masks of a step: `maker(step)` is a pure function, and picklable, so that workers can call
    it.

    `stream` sets apart makers of one seed. `truncate` cuts index sets to the smallest of the
    batch, as the reference does; without, each clip keeps all of its own. Sample indices count
    from `rank * batch`; see blocks.py for what depends on what.
    """

    groups: tuple[Blocks, ...]
    grid: Grid
    batch: int
    seed: int
    stream: int = 0
    rank: int = 0
    weigh: bool = True
    offset: bool = False
    truncate: bool = True

    def __call__(self, step: int) -> Masks:
        """The masks of `step`; ValueError if the groups' blocks cannot leave context and
        predictions."""
        pairs = []
        for number, blocks in enumerate(self.groups):
            hidden_BN = covered(
                blocks, self.grid, seed=self.seed, step=step, rank=self.rank,
                samples=range(self.batch), group=number, stream=self.stream,
            ).reshape(self.batch, -1)  # fmt: skip
            alike = [hidden_BN] if self.truncate else np.split(hidden_BN, self.batch)
            pairs += [_index_sets(blocks, part_BN, number) for part_BN in alike]
        weights = None
        if self.weigh:
            weights = tuple(
                distance_weights(context, predict, self.grid, offset=self.offset)
                for context, predict in pairs
            )
        clips = None if self.truncate else tuple(range(self.batch)) * len(self.groups)
        return Masks(tuple(c for c, _ in pairs), tuple(p for _, p in pairs), weights, clips)


def _index_sets(blocks: Blocks, hidden_BN: NDArray[np.bool_], group: int) -> tuple[Tensor, Tensor]:
    """Context and predicted tokens of clips that keep equally many."""
    context = _truncated(~hidden_BN, blocks.max_keep)
    predict = _truncated(hidden_BN)
    if blocks.full_complement:
        predict = _complement(context, hidden_BN.shape[1])
    elif blocks.pred_full_complement:
        context = _complement(predict, hidden_BN.shape[1])
    if blocks.inv_block:
        context, predict = predict, context
    if not (context.size and predict.size):
        raise ValueError(
            f"masks: group {group} leaves {context.shape[1]} context and {predict.shape[1]} "
            "predicted tokens; both must be positive"
        )
    return torch.from_numpy(context), torch.from_numpy(predict)


def _truncated(chosen_BN: NDArray[np.bool_], most: int | None = None) -> NDArray[np.int64]:
    """The first chosen tokens of each sample, as many as the poorest sample has (and at most
    `most`)."""
    keep = int(chosen_BN.sum(axis=1).min())
    keep = keep if most is None else min(keep, most)
    first = chosen_BN & (chosen_BN.cumsum(axis=1) <= keep)
    return np.nonzero(first)[1].reshape(len(chosen_BN), keep).astype(np.int64)


def _complement(index_BK: NDArray[np.int64], num_tokens: int) -> NDArray[np.int64]:
    free = np.ones((len(index_BK), num_tokens), dtype=np.bool_)
    np.put_along_axis(free, index_BK, False, axis=1)
    return np.nonzero(free)[1].reshape(len(index_BK), -1).astype(np.int64)


def counts(maker: MaskMaker, steps: Sequence[int]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Context and predicted tokens a clip of each group, step by step, for planning."""
    return [kept_tokens(maker(step)) for step in steps]


def kept_tokens(masks: Masks) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Context and predicted tokens a clip of each group.

    Where clips keep all of their own, the whole tokens of the mean.
    """

    def kept(index_sets: Sequence[Tensor]) -> int:
        return sum(i.numel() for i in index_sets) // sum(len(i) for i in index_sets)

    groups = masks.by_group()
    context, predict = (
        tuple(kept(getattr(group, kind)) for group in groups) for kind in ("context", "predict")
    )
    return context, predict
