"""Distance of each context token to the nearest predicted token of its clip.

On a GPU all pairs are compared (kernel.py). The twin here is an exact separable distance
transform: the squared distance is a sum over the axes, so the minimum over all predicted tokens is
taken one axis at a time, `S N (T + H + W)` small additions where comparing pairs takes `S Kc Kp`.

Shapes: B batch, K kept tokens, S segments (the clips of all mask groups), R context and P
predicted tokens of all segments, N = T H W grid tokens.
"""

from typing import Any

import torch
from torch import Tensor

from ..backend import Backend, use_triton
from ..checks import INDEX_DTYPES, check_in_range, check_same_device, reads_values
from ..library import custom_op

Grid = tuple[int, int, int]


def mask_distance(
    context_BK: Tensor, predict_BK: Tensor, grid: Grid, *, backend: Backend = "auto"
) -> Tensor:
    """Euclidean distance of each context token to the nearest predicted one of its clip, in grid
    units.

    context_BK, predict_BK: [B, K] int32 or int64 token indices below T*H*W; at least one
    predicted token a clip. grid: (T, H, W). Returns [B, K context] float32, exact: the root of an
    integer (docs/method.md section 5). Raises ValueError for shapes, dtypes or indices that do
    not fit.
    """
    for name, index in (("context", context_BK), ("predict", predict_BK)):
        if index.ndim != 2 or index.dtype not in INDEX_DTYPES:
            raise ValueError(
                f"{name}: expected int32 or int64 indices [B, K], "
                f"got {index.dtype} {tuple(index.shape)}"
            )
    if context_BK.shape[0] != predict_BK.shape[0]:
        raise ValueError(f"batch: context has {len(context_BK)} clips, predict {len(predict_BK)}")
    if predict_BK.shape[1] == 0:
        raise ValueError("predict: expected at least one predicted token a clip, got none")
    context_offset, predict_offset = (
        torch.arange(len(index) + 1, device=index.device) * index.shape[1]
        for index in (context_BK, predict_BK)
    )
    distance_R = mask_distance_jagged(
        context_BK.reshape(-1), predict_BK.reshape(-1), context_offset, predict_offset,
        context_BK.shape[1], grid, backend=backend,
    )  # fmt: skip
    return distance_R.view(context_BK.shape)


def mask_distance_jagged(
    context_R: Tensor,
    predict_P: Tensor,
    context_offset: Tensor,
    predict_offset: Tensor,
    most_context: int,
    grid: Grid,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """The same for segments of any lengths behind one another: all clips of all mask groups at
    once.

    context_R, predict_P: int32 or int64 token indices. context_offset, predict_offset: [S+1]
    int64; segment s owns `offset[s]:offset[s+1]`. most_context: the longest segment's context
    tokens. Returns [R] float32. Raises ValueError for what does not fit; a segment without a
    predicted token is refused where values may be looked at (checks.py).
    """
    for name, index in (("context", context_R), ("predict", predict_P)):
        if index.ndim != 1 or index.dtype not in INDEX_DTYPES:
            raise ValueError(
                f"{name}: expected int32 or int64 indices, one axis, "
                f"got {index.dtype} {tuple(index.shape)}"
            )
    for name, offset in (("context_offset", context_offset), ("predict_offset", predict_offset)):
        if offset.ndim != 1 or offset.dtype != torch.int64 or len(offset) < 2:
            raise ValueError(
                f"{name}: expected int64 [segments + 1], got {offset.dtype} {tuple(offset.shape)}"
            )
    if len(context_offset) != len(predict_offset):
        raise ValueError(
            f"predict_offset: expected {len(context_offset)} values like context_offset, "
            f"got {len(predict_offset)}"
        )
    if len(grid) != 3 or min(grid) < 1:
        raise ValueError(f"grid: expected three positive sizes (T, H, W), got {grid}")
    check_same_device(
        context=context_R, predict=predict_P, context_offset=context_offset,
        predict_offset=predict_offset,
    )  # fmt: skip
    distance_R: Tensor = _mask_distance(
        context_R, predict_P, context_offset, predict_offset, most_context, list(grid), backend
    )
    return distance_R


@custom_op("mask_distance")
def _mask_distance(
    context_R: Tensor,
    predict_P: Tensor,
    context_offset: Tensor,
    predict_offset: Tensor,
    most_context: int,
    grid: list[int],
    backend: str,
) -> Tensor:
    t, h, w = grid
    for name, index in (("context", context_R), ("predict", predict_P)):
        check_in_range(name, index, t * h * w, f"the grid {(t, h, w)}")
    _check_offsets("context_offset", context_offset, len(context_R), 0, most_context)
    _check_offsets("predict_offset", predict_offset, len(predict_P), 1, len(predict_P))
    context_R, predict_P = context_R.contiguous(), predict_P.contiguous()
    offsets = context_offset.contiguous(), predict_offset.contiguous()
    if use_triton(backend, context_R):
        from . import kernel

        return kernel.mask_distance(context_R, predict_P, *offsets, most_context, (t, h, w))
    return _distance_transform(context_R, predict_P, *offsets, (t, h, w))


@_mask_distance.register_fake
def _(context_R: Tensor, *rest: Any) -> Tensor:
    return context_R.new_empty(context_R.shape, dtype=torch.float32)


def _check_offsets(name: str, offset: Tensor, rows: int, least: int, most: int) -> None:
    if not reads_values(offset):
        return
    length = offset.diff()
    short, long = int(length.min()), int(length.max())
    if int(offset[0]) != 0 or int(offset[-1]) != rows or short < least or long > most:
        raise ValueError(
            f"{name}: expected to rise from 0 to {rows} by {least} to {most} a segment, got "
            f"{int(offset[0])} to {int(offset[-1])} by {short} to {long}"
        )


def _distance_transform(
    context_R: Tensor, predict_P: Tensor, context_offset: Tensor, predict_offset: Tensor, grid: Grid
) -> Tensor:
    device, num_tokens = context_R.device, grid[0] * grid[1] * grid[2]
    segments = len(context_offset) - 1
    base = torch.arange(segments, device=device) * num_tokens

    def place(index: Tensor, offset: Tensor) -> Tensor:
        return index + base.repeat_interleave(offset.diff(), output_size=len(index))

    # Larger than any squared distance on the grid, and exact in float32 together with them.
    far = float(sum(n * n for n in grid) + 1)
    square = torch.full((segments * num_tokens,), far, device=device)
    square.index_fill_(0, place(predict_P, predict_offset), 0.0)
    square = square.view(segments, *grid)
    for axis, length in enumerate(grid, start=1):
        step = torch.arange(length, device=device, dtype=torch.float32)
        cost = (step[:, None] - step[None, :]).square()
        moved = square.movedim(axis, -1)
        square = (moved[..., None, :] + cost).amin(-1).movedim(-1, axis)
    return square.reshape(-1).index_select(0, place(context_R, context_offset)).sqrt_()
