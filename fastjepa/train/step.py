"""The method on one screen: one V-JEPA 2.1 training step (docs/method.md, sections 5 and 6).

Shapes: B batch, N grid tokens, R packed rows of kept tokens, D width, P predictor width, G mask
groups.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastjepa.masking.batch import Masks
from fastjepa.model import Encoder, Predictor
from fastjepa.model.encoder import Shown
from fastjepa.model.predictor import Asked
from fastjepa.model.segments import num_rows
from fastjepa.objective.dense_loss import (
    LossTerms,
    Objective,
    dense_loss,
    mean_of_clips,
    mean_of_groups,
)
from fastjepa.observe.stages import stage
from fastjepa.train.engine import Engine
from fastjepa.train.guard import LossGuard


@dataclass(frozen=True)
class MicroBatch:
    """Clips of one modality with their masks: `clip` [B, 3, T, H, W], normalised; T = 1 is an
    image.

    `share` weighs its loss in the optimizer step, `context_weight` is lambda at this step. `last`:
    the optimizer step ends with it.
    """

    clip: Tensor
    masks: Masks
    share: float
    context_weight: float
    last: bool = True


@dataclass(frozen=True)
class Jepa:
    """The networks and the objective that ties them together.

    `target` is the encoder's moving average. A frozen `teacher` gives the targets in its place,
    of the blocks `target_levels`, and leaves the average to be kept at the end.
    """

    encoder: Encoder
    predictor: Predictor
    target: Encoder
    objective: Objective
    levels: tuple[int, ...]
    target_levels: tuple[int, ...]
    teacher: Encoder | None = None

    @property
    def source(self) -> Encoder:
        """The network whose features are the targets."""
        return self.target if self.teacher is None else self.teacher


@dataclass(frozen=True)
class StepReport:
    """What happened in a step, all still on the device."""

    loss: Tensor
    terms: tuple[LossTerms, ...]
    grad_norm: Tensor
    veto: Tensor
    grad_norms: dict[str, Tensor] = field(default_factory=dict)


def forward(jepa: Jepa, batches: Sequence[MicroBatch], dtype: torch.dtype) -> list[LossTerms]:
    """Targets of all tokens, features of the visible ones, predictions of every token, and the
    loss of each micro-batch.

    All go through each network as one packed sequence, whatever their shapes and modalities.
    """
    targets_MD, levels_RD = _encode(jepa, batches)
    masks = [batch.masks for batch in batches]
    return _predict(jepa, batches, masks, targets_MD, levels_RD, dtype)


def forward_backward(
    jepa: Jepa, engine: Engine, batches: Sequence[MicroBatch]
) -> Sequence[LossTerms]:
    """`forward` and its gradients, weighed by the batches' shares.

    With `engine.in_turn`, for one micro-batch, the predictor and the loss go through one mask
    group after the other, each back to the context features at once: the same sum, and only one
    group's activations are held. From the second group on, when the first one's gradients are
    held beside them, half of the clips go at a time.
    """
    if not engine.in_turn:
        found: list[LossTerms] = []

        def loss() -> Tensor:
            found.extend(forward(jepa, batches, engine.dtype))
            first, *others = (t.total * b.share for t, b in zip(found, batches, strict=True))
            return sum(others, start=first)

        total = engine.forward(loss)
        with stage("backward"):
            engine.backward(total, last=batches[-1].last)
        return found
    (batch,) = batches
    with engine.autocast():
        (targets_MD,), levels_RD = _encode(jepa, batches)
    leaves = [level.detach().requires_grad_() for level in levels_RD]
    first, *others = batch.masks.by_group()
    groups = [[first], *(group.halves() for group in others)]
    rows = [num_rows(part.context) for parts in groups for part in parts]
    levels = zip(*(leaf.split(rows) for leaf in leaves), strict=True)
    found = []
    for parts in groups:
        shares = [part.sequences / first.sequences for part in parts]
        terms = []
        for part, share in zip(parts, shares, strict=True):
            with engine.autocast():
                (own,) = _predict(jepa, batches, [part], [targets_MD], next(levels), engine.dtype)
            with stage("backward"):
                engine.backward(own.total * (batch.share * share / len(groups)))
            terms.append(own.detached())
        found.append(mean_of_clips(terms, shares))
    with stage("backward"):
        torch.autograd.backward(levels_RD, [leaf.grad for leaf in leaves])
    return [mean_of_groups(found)]


def _encode(
    jepa: Jepa, batches: Sequence[MicroBatch]
) -> tuple[list[tuple[Tensor, ...]], list[Tensor]]:
    """The target levels of each micro-batch, and the context encoder's of all."""
    with stage("target"), torch.no_grad():
        whole = [Shown(batch.clip) for batch in batches]
        levels_MD = _levels(jepa.source, whole, jepa.target_levels)
        sizes = [len(batch.clip) * math.prod(jepa.source.grid(batch.clip)) for batch in batches]
        targets_MD = list(zip(*(_split(level, sizes) for level in levels_MD), strict=True))
    with stage("context"):
        seen = [Shown(batch.clip, batch.masks.context, batch.masks.clips) for batch in batches]
        levels_RD = _levels(jepa.encoder, seen, jepa.levels)
    return targets_MD, levels_RD


def _levels(encoder: Encoder, shown: Sequence[Shown], levels: tuple[int, ...]) -> list[Tensor]:
    (clip, groups, clips), *beside = shown
    found: list[Tensor] = encoder(clip, groups, clips=clips, levels=levels, beside=beside)
    return found


def _predict(
    jepa: Jepa,
    batches: Sequence[MicroBatch],
    masks: Sequence[Masks],
    targets_MD: Sequence[Sequence[Tensor]],
    levels_RD: Sequence[Tensor],
    dtype: torch.dtype,
) -> list[LossTerms]:
    with stage("predictor"):
        first, *beside = (
            Asked(own.context, own.predict, jepa.encoder.grid(batch.clip), batch.clip.shape[2] == 1)
            for batch, own in zip(batches, masks, strict=True)
        )
        predicted_RP, context_RP = jepa.predictor(
            levels_RD, first.context_groups_BK, first.predict_groups_BK, first.grid,
            image=first.image, beside=beside,
        )  # fmt: skip
    with stage("loss"):
        predicted = _split(predicted_RP.to(dtype), [num_rows(own.predict) for own in masks])
        context = _split(context_RP.to(dtype), [num_rows(own.context) for own in masks])
        return [
            dense_loss(
                jepa.objective,
                predicted_RP=predicted[number],
                context_RP=context[number],
                predict_head=jepa.predictor.predictor_proj,
                context_head=jepa.predictor.predictor_proj_context,
                targets_MD=targets_MD[number],
                predict_groups_BK=own.predict,
                context_groups_BK=own.context,
                weights_BK=own.weights,
                context_weight=batch.context_weight,
                num_tokens=math.prod(jepa.source.grid(batch.clip)),
                clips=own.clips,
            )
            for number, (batch, own) in enumerate(zip(batches, masks, strict=True))
        ]


def _split(x_R: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """The rows of each micro-batch; a single one's gradient is not copied on its way back."""
    return [x_R] if len(sizes) == 1 else x_R.split(sizes)


def train_step(
    jepa: Jepa,
    engine: Engine,
    guard: LossGuard,
    micro_batches: Iterable[MicroBatch],
    *,
    step: int,
    lr: float,
    weight_decay: float,
    momentum: float,
    norms_by_part: bool = False,
    packed: bool = False,
) -> StepReport:
    """One optimizer step over its micro-batches, then the EMA. Nothing waits for the device.

    The micro-batches run one after the other, or `packed` into one sequence: the same sum, in
    fewer and larger passes and the memory of all.

    On many ranks all take the step or none does: the guard sees the ranks' mean loss, and one
    rank's veto is everyone's. `norms_by_part` adds the gradient norm of each part of the networks
    to the report.
    """
    loss = torch.zeros((), device=engine.device)
    terms: list[LossTerms] = []
    for batches in [list(micro_batches)] if packed else ([batch] for batch in micro_batches):
        found = forward_backward(jepa, engine, batches)
        for batch, term in zip(batches, found, strict=True):
            loss = loss + term.total.detach() * batch.share
        terms += found
    loss = engine.ranks.mean(loss)
    norms = engine.part_norms() if norms_by_part else {}
    grad_norm = engine.grad_norm()
    veto = engine.ranks.any(guard.veto(step, loss, grad_norm))
    engine.step(lr=lr, weight_decay=weight_decay, momentum=momentum, veto=veto)
    return StepReport(loss, tuple(terms), grad_norm, veto, norms)
