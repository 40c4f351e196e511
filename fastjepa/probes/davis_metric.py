"""J and F of video object segmentation as DAVIS defines them: regions and boundaries of masks.

J is the intersection over union. F is the harmonic mean of the boundaries' precision and recall;
a boundary pixel is right if the other boundary is within 0.8 % of the picture's diagonal.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import conv2d

TOLERANCE = 0.008


def region(found_HW: Tensor, true_HW: Tensor) -> float:
    """J of two bool masks; 1 if both are empty."""
    union = int((found_HW | true_HW).sum())
    return int((found_HW & true_HW).sum()) / union if union else 1.0


def boundary(found_HW: Tensor, true_HW: Tensor) -> float:
    """F of two bool masks; 1 if neither has a boundary, 0 if only one has."""
    found, true = outline(found_HW), outline(true_HW)
    num_found, num_true = int(found.sum()), int(true.sum())
    if not num_found or not num_true:
        return float(num_found == num_true)
    reach = math.ceil(TOLERANCE * math.hypot(*found_HW.shape))
    precision = int((found & widened(true, reach)).sum()) / num_found
    recall = int((true & widened(found, reach)).sum()) / num_true
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def outline(mask_HW: Tensor) -> Tensor:
    """The boundary, bool [H, W]: pixels that differ from the one right of, below or diagonally
    below them; beyond the last row and column the mask goes on as it is."""
    right, below = mask_HW.clone(), mask_HW.clone()
    right[:, :-1], below[:-1] = mask_HW[:, 1:], mask_HW[1:]
    diagonal = right.clone()
    diagonal[:-1] = right[1:]
    return (mask_HW ^ right) | (mask_HW ^ below) | (mask_HW ^ diagonal)


def widened(mask_HW: Tensor, reach: int) -> Tensor:
    """Every pixel within `reach` pixels (Euclidean) of a set one."""
    place = torch.arange(-reach, reach + 1)
    disk = (place[:, None].square() + place.square() <= reach**2).float()
    near = conv2d(mask_HW[None, None].float().cpu(), disk[None, None], padding=reach)[0, 0]
    return (near > 0.5).to(mask_HW.device)
