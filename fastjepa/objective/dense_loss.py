"""The loss of one micro-batch from the predictor's rows and the raw target levels (docs/method.md
section 5).

Shapes: R packed rows, P predictor width, M = B N target rows, D target width, G mask groups, L
levels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastjepa_kernels import linear_dense_l1, packed_rows


@dataclass(frozen=True)
class Objective:
    """Which differences count, and how much."""

    level_weights: tuple[float, ...]
    exponent: float = 1.0
    normalize_prediction: bool = False


@dataclass(frozen=True)
class LossTerms:
    """`total = predict + weight * context`; `*_terms` [G, L] are the means before level weights."""

    total: Tensor
    predict: Tensor
    context: Tensor | None
    predict_terms: Tensor
    context_terms: Tensor | None

    def detached(self) -> "LossTerms":
        """The same numbers without their graph."""
        tensors = (self.total, self.predict, self.context, self.predict_terms, self.context_terms)
        return LossTerms(*(None if t is None else t.detach() for t in tensors))  # type: ignore[arg-type]


def dense_loss(
    objective: Objective,
    *,
    predicted_RP: Tensor,
    context_RP: Tensor,
    predict_head: nn.Linear,
    context_head: nn.Linear,
    targets_MD: Sequence[Tensor],
    predict_groups_BK: Sequence[Tensor],
    context_groups_BK: Sequence[Tensor],
    weights_BK: Sequence[Tensor] | None,
    context_weight: float,
    num_tokens: int,
    clips: Sequence[int] | None = None,
) -> LossTerms:
    """`L = L_pred + lambda L_ctx` over all mask groups and levels.

    predicted_RP, context_RP: the predictor's rows before its heads, in the dtype the heads run
    in. targets_MD: raw levels of the target encoder, all tokens, `num_tokens` a clip. weights_BK:
    distance weights of the context tokens, None for 1. The context term is left out, and None, if
    `context_weight` is 0. `clips`: the clip that each index set starts with, None for the first.
    Index sets have a term each, all of one weight: where each is of one clip, a clip weighs the
    same whatever it keeps.
    """

    def term(
        rows_RP: Tensor, head: nn.Linear, groups: Sequence[Tensor], weight_R: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return linear_dense_l1(
            rows_RP, head.weight, head.bias, targets_MD, packed_rows(groups, num_tokens, clips),
            [index.numel() for index in groups], token_weight_R=weight_R,
            level_weights=objective.level_weights, exponent=objective.exponent,
            normalize_prediction=objective.normalize_prediction,
        )  # fmt: skip

    predict, predict_terms = term(predicted_RP, predict_head, predict_groups_BK, None)
    if context_weight == 0.0:
        return LossTerms(predict, predict, None, predict_terms, None)
    weight_R = None if weights_BK is None else torch.cat([w.flatten() for w in weights_BK])
    context, context_terms = term(context_RP, context_head, context_groups_BK, weight_R)
    total = predict + context_weight * context
    return LossTerms(total, predict, context, predict_terms, context_terms)


def mean_of_clips(parts: Sequence[LossTerms], shares: Sequence[float]) -> LossTerms:
    """The terms of a mask group [1, L] from those of parts of its clips, which make up `shares`."""

    def mean(values: Sequence[Tensor | None]) -> Tensor | None:
        known = [
            share * (value.mean(0, keepdim=True) if value.ndim else value)
            for value, share in zip(values, shares, strict=True)
            if value is not None
        ]
        return torch.stack(known).sum(0) if known else None

    names = ("total", "predict", "context", "predict_terms", "context_terms")
    return LossTerms(*(mean([getattr(part, name) for part in parts]) for name in names))  # type: ignore[arg-type]


def mean_of_groups(parts: Sequence[LossTerms]) -> LossTerms:
    """The terms of all mask groups from those of each: losses averaged, level terms stacked."""

    def mean(values: Sequence[Tensor | None]) -> Tensor | None:
        known = [value for value in values if value is not None]
        return torch.stack(known).mean(0) if known else None

    total, predict = (mean([getattr(p, name) for p in parts]) for name in ("total", "predict"))
    assert total is not None
    assert predict is not None
    context_terms = [p.context_terms for p in parts if p.context_terms is not None]
    return LossTerms(
        total,
        predict,
        mean([p.context for p in parts]),
        torch.cat([p.predict_terms for p in parts]),
        torch.cat(context_terms) if context_terms else None,
    )
