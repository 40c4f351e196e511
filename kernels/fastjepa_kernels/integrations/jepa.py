"""The fused ops inside code in the style of I-JEPA, V-JEPA and V-JEPA 2: `apply_masks`, then L1
or smooth L1 on the kept tokens.

    from fastjepa_kernels.integrations import jepa
    jepa.patch()

replaces `apply_masks` wherever that code has bound it. The losses take the target encoder's raw
output: LayerNorm, masking and repeating happen when a row is read (docs/fused-ops.md).

Shapes: B batch, N grid tokens, K kept tokens, D width.
"""

from collections.abc import Sequence
from typing import cast

from torch import Tensor

from ..backend import Backend
from ..dense_l1.op import dense_l1
from ..packing import packed_rows
from .masked import Nested, apply_masks, masked_loss, target_levels, update_target
from .patching import Patch, Replacement

__all__ = ["apply_masks", "l1_loss", "patch", "smooth_l1_loss", "update_target"]


def patch(module: str = "src.masks.utils") -> Patch:
    """Replace `module.apply_masks`; returns a handle with `undo()`, also a context manager.

    Raises ValueError, before anything is changed, if it is not there or takes other arguments.
    """
    return Patch((Replacement(module, "apply_masks", apply_masks),))


def smooth_l1_loss(
    z: Tensor,
    h: Tensor,
    masks_enc: Sequence[Tensor],
    masks_pred: Sequence[Tensor],
    *,
    beta: float = 1.0,
    normalize_target: bool = True,
    overwrite_prediction: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """I-JEPA's loss: the mean smooth L1 of all predictions, in one launch.

    z: [masks_pred x masks_enc x B, K, D] as its predictor returns them, the context masks of a
    predicted mask behind one another. h: [B, N, D], raw. masks_pred: [B, K] each; of masks_enc
    only the number counts. normalize_target: False if h is normalised already.
    overwrite_prediction: the gradient takes z's memory. Returns the 0-d float32 mean. Raises
    ValueError for what does not fit.
    """
    masks = [mask for mask in masks_pred for _ in masks_enc]
    rows = sum(len(mask) for mask in masks)
    if z.ndim != 3 or not masks or z.shape[:2] != (rows, masks[0].shape[-1]):
        shapes = [tuple(mask.shape) for mask in masks_pred]
        raise ValueError(
            f"z: expected [{rows}, K, D] for predicted masks {shapes} and {len(masks_enc)} context "
            f"masks, got {tuple(z.shape)}"
        )
    targets_MD = target_levels("h", h, 1)
    total, _ = dense_l1(
        z.flatten(0, 1), targets_MD, packed_rows(masks, h.shape[1]), [z.shape[0] * z.shape[1]],
        smooth=beta, normalize_target=normalize_target, overwrite_prediction=overwrite_prediction,
        backend=backend,
    )  # fmt: skip
    return total


def l1_loss(
    z: Sequence[Tensor] | Nested,
    h: Tensor | Sequence[Tensor],
    masks_pred: Sequence[Tensor] | Nested,
    *,
    loss_exp: float = 1.0,
    normalize_target: bool = True,
    overwrite_prediction: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """V-JEPA's loss: the mean over all masks of the mean `|z - h|^p / p`, one launch a mask.

    V-JEPA: z a list of [B, K, D], h [B, N, D], masks_pred a list of [B, K]. V-JEPA 2: lists of
    those, one entry for each clip length. h is raw, unless `normalize_target` is False.
    overwrite_prediction: the gradient takes z's memory. Returns the 0-d float32 mean. Raises
    ValueError for what does not fit.
    """
    if isinstance(h, Tensor):
        z, h = [cast(Sequence[Tensor], z)], [h]
        masks_pred = [cast(Sequence[Tensor], masks_pred)]
    return masked_loss(
        cast(Nested, z), h, cast(Nested, masks_pred), None, levels=1, exponent=loss_exp,
        normalize_target=normalize_target, normalize_prediction=False,
        overwrite_prediction=overwrite_prediction, backend=backend,
    )  # fmt: skip
