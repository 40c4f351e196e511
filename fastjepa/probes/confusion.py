"""A confusion matrix and what follows from it. Shapes: C classes, any number of pixels."""

import torch
from torch import Tensor

IGNORED = 255


def confusion(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Counts int64 [C, C], row the true class, column the predicted one; IGNORED is left out.

    predicted, labels: integers of one shape. Raises ValueError naming a label that is no class.
    """
    kept = labels != IGNORED
    true, guess = labels[kept].long(), predicted[kept].long()
    if true.numel() and not 0 <= int(true.min()) <= int(true.max()) < num_classes:
        raise ValueError(
            f"labels: expected 0 to {num_classes - 1}, or {IGNORED} for ignored, found "
            f"{int(true.min())} to {int(true.max())}"
        )
    return torch.bincount(true * num_classes + guess, minlength=num_classes**2).view(
        num_classes, num_classes
    )


def class_ious(counts_CC: Tensor) -> Tensor:
    """Intersection over union of each class, float64 [C]; NaN for one that is nowhere."""
    hit_C = counts_CC.diagonal().double()
    union_C = counts_CC.sum(0) + counts_CC.sum(1) - counts_CC.diagonal()
    return torch.where(union_C > 0, hit_C / union_C, torch.nan)


def mean_iou(counts_CC: Tensor) -> float:
    """mIoU, 0 to 1: the mean over classes that are in labels or predictions."""
    return class_ious(counts_CC).nanmean().item()
