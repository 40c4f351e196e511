"""What the official training scripts of I-JEPA, V-JEPA, V-JEPA 2 and 2.1 have in common: tokens
picked by masks, a loss on them, and a target that follows.

Their objects are lists. Outer: clips of one length each ("fpc", frames per clip); inner: one
entry a mask. Shapes: B batch, N grid tokens, K kept tokens, L levels, D width, E = L D, M = B N.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..backend import Backend
from ..dense_l1.op import dense_l1
from ..ema.op import ema_update
from ..packing import packed_rows
from ..tokens.op import gather_tokens

Nested = Sequence[Sequence[Tensor]]


def apply_masks(x: Tensor, masks: Sequence[Tensor], concat: bool = True) -> Tensor | list[Tensor]:
    """The tokens that each mask names, without index copies of the tokens' size.

    x: [B, N, D]. masks: int64 or int32 [B, K] each, no token twice in a clip. Returns
    [len(masks) B, K, D], mask by mask, in one launch, or with `concat=False` a list of [B, K, D].
    Raises ValueError for what does not fit.
    """
    if not concat:
        return [gather_tokens(x, mask) for mask in masks]
    kept = {mask.shape[-1] for mask in masks}
    if len(kept) != 1:
        raise ValueError(f"masks: expected one number of kept tokens to join, got {sorted(kept)}")
    return gather_tokens(x, list(masks)).view(-1, kept.pop(), x.shape[-1])


def masked_loss(
    z: Nested,
    h: Sequence[Tensor],
    masks: Nested,
    weights: Nested | None,
    *,
    levels: int,
    exponent: float,
    normalize_target: bool,
    normalize_prediction: bool,
    overwrite_prediction: bool,
    backend: Backend,
) -> Tensor:
    """`mean over all masks of mean w |z - y|^p / p`, one launch a mask: predictions that lie
    apart in memory are not joined.

    z: [B, K, E] each. h: [B, N, E] for each clip length; y are its rows that the masks [B, K]
    name, each level normalised. weights: [B, K] each, or None for 1.
    """
    check_nesting("z", z, masks)
    if len(h) != len(masks):
        raise ValueError(f"h: expected one tensor a clip length, {len(masks)}, got {len(h)}")
    if weights is not None:
        check_nesting("weights", weights, masks)
    share = 1.0 / sum(len(group) for group in masks)
    total = h[0].new_zeros((), dtype=torch.float32)
    for i, target_BNE in enumerate(h):
        targets_MD = target_levels(f"h[{i}]", target_BNE, levels)
        for j, (z_BKE, mask_BK) in enumerate(zip(z[i], masks[i], strict=True)):
            if z_BKE.ndim != 3 or z_BKE.shape[:2] != mask_BK.shape:
                raise ValueError(
                    f"z[{i}][{j}]: expected [B, K, E] for a mask {tuple(mask_BK.shape)}, "
                    f"got {tuple(z_BKE.shape)}"
                )
            if len(mask_BK) != len(target_BNE):
                raise ValueError(
                    f"masks[{i}][{j}]: expected {len(target_BNE)} clips like h[{i}], "
                    f"got {len(mask_BK)}"
                )
            part, _ = dense_l1(
                z_BKE.flatten(0, 1), targets_MD, packed_rows([mask_BK], target_BNE.shape[1]),
                [mask_BK.numel()], group_weights=[share], exponent=exponent,
                token_weight_R=None if weights is None else weights[i][j].reshape(-1),
                normalize_target=normalize_target, normalize_prediction=normalize_prediction,
                overwrite_prediction=overwrite_prediction, backend=backend,
            )  # fmt: skip
            total = total + part
    return total


def target_levels(name: str, target_BNE: Tensor, levels: int) -> list[Tensor]:
    """Levels that lie side by side as views [M, D] of their own."""
    if target_BNE.ndim != 3 or levels < 1 or target_BNE.shape[-1] % levels:
        raise ValueError(
            f"{name}: expected [B, N, channels of {levels} levels], got {tuple(target_BNE.shape)}"
        )
    rows_ME = target_BNE.detach().flatten(0, 1)
    return list(rows_ME.split(rows_ME.shape[-1] // levels, dim=-1))


def check_nesting(name: str, nested: Nested, masks: Nested) -> None:
    """Raises ValueError unless there is one entry a mask."""
    found, expected = [len(group) for group in nested], [len(group) for group in masks]
    if found != expected or not sum(expected):
        raise ValueError(
            f"{name}: expected one entry a mask, {expected} for each clip length, got {found}"
        )


def update_target(
    encoder: nn.Module,
    target_encoder: nn.Module,
    m: float | Tensor,
    *,
    veto: Tensor | None = None,
    veto_nonfinite: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """`target = m target + (1 - m) encoder` for all parameters, in one launch; see `ema_update`.

    Returns a 0-d int32 tensor: 1 if the update was vetoed. Raises ValueError if the parameters
    do not pair up.
    """
    return ema_update(
        list(target_encoder.parameters()), list(encoder.parameters()), m, veto=veto,
        veto_nonfinite=veto_nonfinite, backend=backend,
    )  # fmt: skip
