"""Distance of each context token to the nearest predicted token: an exact separable distance
transform.

The squared distance is a sum over the axes, so the minimum over all predicted tokens is taken one
axis at a time: `B N (T + H + W)` small additions where comparing all pairs takes `B Kc Kp`.

Shapes: B batch, K kept tokens, N = T H W grid tokens.
"""

import torch
from torch import Tensor


def mask_distance(context_BK: Tensor, predict_BK: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Euclidean distance of each context token to the nearest predicted one of its clip, in grid
    units.

    context_BK, predict_BK: [B, K] int32 or int64 token indices below T*H*W; at least one
    predicted token a clip. grid: (T, H, W). Returns [B, K context] float32, exact: the root of an
    integer (docs/method.md section 5). Raises ValueError for shapes, dtypes or indices that do
    not fit.
    """
    num_tokens = grid[0] * grid[1] * grid[2]
    for name, index in (("context", context_BK), ("predict", predict_BK)):
        if index.ndim != 2 or index.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{name}: expected int32 or int64 indices [B, K], "
                f"got {index.dtype} {tuple(index.shape)}"
            )
        if index.device.type == "cpu" and index.numel():
            low, high = int(index.min()), int(index.max())
            if low < 0 or high >= num_tokens:
                raise ValueError(
                    f"{name}: indices {low}..{high} leave the grid {grid} of {num_tokens}"
                )
    if context_BK.shape[0] != predict_BK.shape[0]:
        raise ValueError(f"batch: context has {len(context_BK)} clips, predict {len(predict_BK)}")
    if predict_BK.shape[1] == 0:
        raise ValueError("predict: expected at least one predicted token a clip, got none")

    batch, device = context_BK.shape[0], context_BK.device
    # Larger than any squared distance on the grid, and exact in float32 together with them.
    far = float(sum(n * n for n in grid) + 1)
    square = torch.full((batch, num_tokens), far, device=device)
    square.scatter_(1, predict_BK.long(), 0.0)
    square = square.view(batch, *grid)
    for axis, length in enumerate(grid, start=1):
        place = torch.arange(length, device=device, dtype=torch.float32)
        cost = (place[:, None] - place[None, :]).square()
        moved = square.movedim(axis, -1)
        square = (moved[..., None, :] + cost).amin(-1).movedim(-1, axis)
    return square.reshape(batch, num_tokens).gather(1, context_BK.long()).sqrt_()
