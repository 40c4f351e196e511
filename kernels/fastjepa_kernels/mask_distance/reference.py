"""Distance of each context token to the nearest predicted token, by comparing all pairs.

Shapes: B batch, K kept tokens.
"""

import torch
from torch import Tensor


def positions(index_BK: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Token indices to (t, h, w) grid positions: [B, K] -> [B, K, 3] int64 (docs/method.md
    section 1)."""
    _, height, width = grid
    return torch.stack(
        (index_BK // (height * width), index_BK // width % height, index_BK % width), dim=-1
    )


def mask_distance(context_BK: Tensor, predict_BK: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Euclidean distance in token-grid units, [B, K context] float64 (docs/method.md section 5,
    `d_i`)."""
    context = positions(context_BK, grid)
    predict = positions(predict_BK, grid)
    square = (context[:, :, None] - predict[:, None]).square().sum(-1)
    return square.amin(-1).double().sqrt()
