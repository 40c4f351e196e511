"""The method on one screen: one V-JEPA 2.1 training step (docs/method.md, sections 5 and 6).

Shapes: B batch, N grid tokens, R packed rows of kept tokens, D width, P predictor width, G mask
groups.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastjepa.masking.batch import Masks
from fastjepa.model import Encoder, Predictor
from fastjepa.objective.dense_loss import LossTerms, Objective, dense_loss, mean_of_groups
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


def forward(jepa: Jepa, batch: MicroBatch, dtype: torch.dtype) -> LossTerms:
    """Targets of all tokens, features of the visible ones, predictions of every token, their
    loss."""
    targets_MD, levels_RD = _encode(jepa, batch)
    return _predict(jepa, batch, batch.masks, targets_MD, levels_RD, dtype)


def forward_backward(jepa: Jepa, engine: Engine, batch: MicroBatch) -> LossTerms:
    """`forward` and its gradients, weighed by the batch's share.

    With `engine.in_turn` the predictor and the loss go through one mask group after the other,
    each back to the context features at once: the same sum, and only one group's activations are
    held.
    """
    if not engine.in_turn:
        found: list[LossTerms] = []

        def loss() -> Tensor:
            found.append(forward(jepa, batch, engine.dtype))
            return found[0].total * batch.share

        total = engine.forward(loss)
        with stage("backward"):
            engine.backward(total, last=batch.last)
        return found[0]
    with engine.autocast():
        targets_MD, levels_RD = _encode(jepa, batch)
    leaves = [level.detach().requires_grad_() for level in levels_RD]
    groups = batch.masks.by_group()
    rows = [sum(index.numel() for index in group.context) for group in groups]
    parts = []
    for group, *own_levels in zip(groups, *(leaf.split(rows) for leaf in leaves), strict=True):
        with engine.autocast():
            part = _predict(jepa, batch, group, targets_MD, own_levels, engine.dtype)
        with stage("backward"):
            engine.backward(part.total * (batch.share / len(groups)))
        parts.append(part.detached())
    with stage("backward"):
        torch.autograd.backward(levels_RD, [leaf.grad for leaf in leaves])
    return mean_of_groups(parts)


def _encode(jepa: Jepa, batch: MicroBatch) -> tuple[list[Tensor], list[Tensor]]:
    with stage("target"), torch.no_grad():
        targets_MD = jepa.source(batch.clip, levels=jepa.target_levels)
    with stage("context"):
        masks = batch.masks
        levels_RD = jepa.encoder(batch.clip, masks.context, clips=masks.clips, levels=jepa.levels)
    return targets_MD, levels_RD


def _predict(
    jepa: Jepa,
    batch: MicroBatch,
    masks: Masks,
    targets_MD: Sequence[Tensor],
    levels_RD: Sequence[Tensor],
    dtype: torch.dtype,
) -> LossTerms:
    grid, image = jepa.encoder.grid(batch.clip), batch.clip.shape[2] == 1
    with stage("predictor"):
        predicted_RP, context_RP = jepa.predictor(
            levels_RD, masks.context, masks.predict, grid, image=image
        )
    with stage("loss"):
        return dense_loss(
            jepa.objective,
            predicted_RP=predicted_RP.to(dtype),
            context_RP=context_RP.to(dtype),
            predict_head=jepa.predictor.predictor_proj,
            context_head=jepa.predictor.predictor_proj_context,
            targets_MD=targets_MD,
            predict_groups_BK=masks.predict,
            context_groups_BK=masks.context,
            weights_BK=masks.weights,
            context_weight=batch.context_weight,
            clips=masks.clips,
        )


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
) -> StepReport:
    """One optimizer step over its micro-batches, then the EMA. Nothing waits for the device.

    On many ranks all take the step or none does: the guard sees the ranks' mean loss, and one
    rank's veto is everyone's. `norms_by_part` adds the gradient norm of each part of the networks
    to the report.
    """
    loss = torch.zeros((), device=engine.device)
    terms = []
    for batch in micro_batches:
        term = forward_backward(jepa, engine, batch)
        loss = loss + term.total.detach() * batch.share
        terms.append(term)
    loss = engine.ranks.mean(loss)
    norms = engine.part_norms() if norms_by_part else {}
    grad_norm = engine.grad_norm()
    veto = engine.ranks.any(guard.veto(step, loss, grad_norm))
    engine.step(lr=lr, weight_decay=weight_decay, momentum=momentum, veto=veto)
    return StepReport(loss, tuple(terms), grad_norm, veto, norms)
