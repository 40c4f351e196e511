"""The dense loss of V-JEPA 2.1 as the paper writes it, differentiable, with every pass in the open.

Shapes: R rows (kept tokens of all clips and mask groups), E = L D channels, L levels, D width, G
mask groups, M rows of the targets (all tokens of all clips).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def dense_l1(
    z_RE: Tensor,
    targets_MD: Sequence[Tensor],
    row_R: Tensor,
    group_sizes: Sequence[int],
    *,
    token_weight_R: Tensor | None = None,
    level_weights: Sequence[float] | None = None,
    exponent: float = 1.0,
    normalize_prediction: bool = False,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """`mean_g mean_{r in g, c} w_r |z - y|^p / p` with y the rows of the targets, normalised per
    level.

    Returns the total and the terms [G, L], each the mean over its group's rows and its level's
    channels; the total weighs them by `level_weights` (1/L each if None) and averages the groups
    (docs/method.md section 5).
    """
    levels, width = len(targets_MD), targets_MD[0].shape[-1]
    z_RLD = z_RE.unflatten(-1, (levels, width))
    y_RLD = torch.stack([F.layer_norm(t[row_R], (width,), eps=eps) for t in targets_MD], dim=1)
    if normalize_prediction:
        z_RLD = F.layer_norm(z_RLD, (width,), eps=eps)
    loss_RL = ((z_RLD - y_RLD).abs() ** exponent / exponent).mean(-1)
    if token_weight_R is not None:
        loss_RL = loss_RL * token_weight_R[:, None]
    terms_GL = torch.stack([part.mean(0) for part in loss_RL.split(list(group_sizes))])
    beta_L = z_RE.new_tensor(level_weights or [1.0 / levels] * levels)
    return (terms_GL * beta_L).sum(-1).mean(), terms_GL.detach()


def linear_dense_l1(
    x_RP: Tensor,
    weight_EP: Tensor,
    bias_E: Tensor,
    targets_MD: Sequence[Tensor],
    row_R: Tensor,
    group_sizes: Sequence[int],
    **options: object,
) -> tuple[Tensor, Tensor]:
    """`dense_l1` of the prediction `x W^T + b`."""
    return dense_l1(F.linear(x_RP, weight_EP, bias_E), targets_MD, row_R, group_sizes, **options)  # type: ignore[arg-type]
