"""The method on one screen: one V-JEPA 2.1 training step (SPEC sections 5 and 6).

Shapes: B batch, N grid tokens, R packed rows of kept tokens, D width, P predictor width, G mask
groups.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastjepa.masking.batch import Masks
from fastjepa.model import Encoder, Predictor
from fastjepa.objective.dense_loss import LossTerms, Objective, dense_loss
from fastjepa.objective.health import gradient_norms
from fastjepa.train.engine import TorchEngine
from fastjepa.train.guard import LossGuard


@dataclass(frozen=True)
class MicroBatch:
    """Clips of one modality with their masks: `clip` [B, 3, T, H, W], normalised; T = 1 is an
    image.

    `share` weighs its loss in the optimizer step, `context_weight` is lambda at this step.
    """

    clip: Tensor
    masks: Masks
    share: float
    context_weight: float


@dataclass(frozen=True)
class Jepa:
    """The three networks and the objective that ties them together."""

    encoder: Encoder
    predictor: Predictor
    target: Encoder
    objective: Objective
    levels: tuple[int, ...]
    target_levels: tuple[int, ...]


@dataclass(frozen=True)
class StepReport:
    """What happened in a step, all still on the device."""

    loss: Tensor
    terms: tuple[LossTerms, ...]
    grad_norm: Tensor
    veto: Tensor
    grad_norms: dict[str, Tensor] = field(default_factory=dict)


def forward(jepa: Jepa, batch: MicroBatch, dtype: torch.dtype) -> LossTerms:
    """Targets of all tokens, features of the visible ones, predictions of every token, and their
    loss."""
    masks, image = batch.masks, batch.clip.shape[2] == 1
    with torch.no_grad():
        targets_MD = jepa.target(batch.clip, levels=jepa.target_levels)
    levels_RD = jepa.encoder(batch.clip, masks.context, levels=jepa.levels)
    predicted_RP, context_RP = jepa.predictor(
        levels_RD, masks.context, masks.predict, jepa.encoder.grid(batch.clip), image=image
    )
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
    )


def train_step(
    jepa: Jepa,
    engine: TorchEngine,
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

    `norms_by_part` adds the gradient norm of each part of the networks to the report.
    """
    loss = torch.zeros((), device=engine.device)
    terms = []
    for batch in micro_batches:
        with engine.autocast():
            term = forward(jepa, batch, engine.dtype)
        engine.backward(term.total * batch.share)
        loss = loss + term.total.detach() * batch.share
        terms.append(term)
    norms = gradient_norms(named_parameters(jepa)) if norms_by_part else {}
    grad_norm = engine.grad_norm()
    veto = guard.veto(step, loss, grad_norm)
    engine.step(lr=lr, weight_decay=weight_decay, momentum=momentum, veto=veto)
    return StepReport(loss, tuple(terms), grad_norm, veto, norms)


def named_parameters(jepa: Jepa) -> list[tuple[str, nn.Parameter]]:
    """Every parameter that the optimizer moves, named `encoder.*` and `predictor.*`."""
    return [
        (f"{part}.{name}", parameter)
        for part, module in (("encoder", jepa.encoder), ("predictor", jepa.predictor))
        for name, parameter in module.named_parameters()
    ]
