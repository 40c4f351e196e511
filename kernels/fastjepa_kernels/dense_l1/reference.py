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
    group_weights: Sequence[float] | Tensor | None = None,
    exponent: float = 1.0,
    smooth: float = 0.0,
    normalize_target: bool = True,
    normalize_prediction: bool = False,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """`sum_g v_g mean_{r in g, c} w_r |z - y|^p / p` with y the rows of the targets, normalised
    per level.

    Returns the total and the terms [G, L], each the mean over its group's rows and its level's
    channels, 0 for an empty group; the total weighs them by `level_weights` and `group_weights`
    (1/L and 1/G each if None; docs/method.md section 5). With `smooth` the loss is smooth L1.
    """
    levels, width = len(targets_MD), targets_MD[0].shape[-1]
    z_RLD = z_RE.unflatten(-1, (levels, width))
    y_RLD = torch.stack([t[row_R] for t in targets_MD], dim=1)
    if normalize_target:
        y_RLD = F.layer_norm(y_RLD, (width,), eps=eps)
    if normalize_prediction:
        z_RLD = F.layer_norm(z_RLD, (width,), eps=eps)
    if smooth:
        loss_RL = F.smooth_l1_loss(
            z_RLD.to(y_RLD.dtype), y_RLD, reduction="none", beta=smooth
        ).mean(-1)
    else:
        loss_RL = ((z_RLD - y_RLD).abs() ** exponent / exponent).mean(-1)
    if token_weight_R is not None:
        loss_RL = loss_RL * token_weight_R[:, None]
    terms_GL = torch.stack([t.sum(0) / max(len(t), 1) for t in loss_RL.split(list(group_sizes))])
    beta_L = terms_GL.new_tensor(level_weights or [1.0 / levels] * levels)
    if group_weights is None:
        group_weights = [1.0 / len(group_sizes)] * len(group_sizes)
    weight_G = torch.as_tensor(group_weights, dtype=terms_GL.dtype, device=terms_GL.device)
    return weight_G @ terms_GL @ beta_L, terms_GL.detach()


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
