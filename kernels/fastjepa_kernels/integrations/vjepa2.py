"""The fused ops inside the official V-JEPA 2.1 code (`app/vjepa_2_1`).

    from fastjepa_kernels.integrations import vjepa2
    vjepa2.patch()

replaces the gather of tokens by masks and the distances between masks, wherever that code has
bound them. Its loss and its moving average live inside its `main`, where nothing reaches them;
`dense_loss` and `update_target` take the objects that stand there (docs/fused-ops.md).

Shapes: B batch, N grid tokens, K kept tokens, L levels, D width, E = L D. Lists of lists: clips of
one length each ("fpc"), then masks.
"""

import torch
from torch import Tensor

from ..backend import Backend, use_triton
from ..mask_distance.op import mask_distance
from .masked import Nested, apply_masks, check_nesting, masked_loss, update_target
from .patching import Patch, Replacement

__all__ = ["apply_masks", "compute_mask_distance", "dense_loss", "patch", "update_target"]


def patch() -> Patch:
    """Replace the official functions; returns a handle with `undo()`, also a context manager.

    The checkout must be importable. Raises ValueError, before anything is changed, if its
    functions are not there or take other arguments.
    """
    return Patch(
        (
            Replacement("src.masks.utils", "apply_masks", apply_masks),
            Replacement(
                "app.vjepa_2_1.models.utils.masks_dist",
                "compute_mask_distance",
                compute_mask_distance,
            ),
        )
    )


def compute_mask_distance(
    masks_pred: Nested, masks_enc: Nested, grid_size: int, offset_context_loss: bool
) -> list[list[Tensor]]:
    """Root of the distance of each context token to the nearest predicted one, one launch a mask.

    masks_pred, masks_enc: [B, K] each. grid_size: tokens along height and along width.
    offset_context_loss: distances are divided by `grid_size // 16` first. Returns float32
    [B, K context] for each mask (docs/method.md section 5).
    """
    check_nesting("masks_pred", masks_pred, masks_enc)
    scale = max(1, grid_size // 16) if offset_context_loss else 1
    return [
        [
            _distance(enc, pred, grid_size).div_(scale).sqrt_()
            for pred, enc in zip(preds, encs, strict=True)
        ]
        for preds, encs in zip(masks_pred, masks_enc, strict=True)
    ]


def _distance(context_BK: Tensor, predict_BK: Tensor, side: int) -> Tensor:
    if use_triton("auto", context_BK):
        # The number of frames is not among the arguments, and the kernel does not need it.
        frames = torch.iinfo(torch.int32).max // side**2
    else:
        seen = [int(index.max()) for index in (context_BK, predict_BK) if index.numel()]
        frames = max(seen, default=0) // side**2 + 1
    return mask_distance(context_BK, predict_BK, (frames, side, side))


def dense_loss(
    z: Nested,
    h: list[Tensor],
    masks_to_apply: Nested,
    cls_loss: bool = False,
    d_weights: Nested | None = None,
    *,
    levels: int = 4,
    loss_exp: float = 1.0,
    normalize_target: bool = True,
    normalize_prediction: bool = False,
    overwrite_prediction: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """The official `loss_fn`, on the target encoder's raw output: what `forward_target` does to
    it happens when a row is read (docs/method.md section 5).

    z: predictions [B, K, E] of the predicted or of the context tokens. h: [B, N, E] for each clip
    length, the `levels` side by side. masks_to_apply: [B, K] each. cls_loss: h has a class token
    in front that no mask counts, z has its prediction in front. d_weights: what
    `compute_mask_distance` returned, or None; a token weighs 1 over it. normalize_target: False
    if h is normalised already. normalize_prediction: the official `normalize_predictor`.
    overwrite_prediction: the gradient takes z's memory. Returns the 0-d float32 mean over all
    masks. Raises ValueError for what does not fit.
    """
    if cls_loss:
        masks_to_apply = [[_behind_class_token(m) for m in group] for group in masks_to_apply]
    weights = None
    if d_weights is not None:
        weights = [[distance.reciprocal() for distance in group] for group in d_weights]
    return masked_loss(
        z, h, masks_to_apply, weights, levels=levels, exponent=loss_exp,
        normalize_target=normalize_target, normalize_prediction=normalize_prediction,
        overwrite_prediction=overwrite_prediction, backend=backend,
    )  # fmt: skip


def _behind_class_token(mask_BK: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(mask_BK[:, :1]), mask_BK + 1], dim=1)
