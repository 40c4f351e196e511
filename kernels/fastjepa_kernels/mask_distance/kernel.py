"""Nearest predicted token of each context token, by integer comparison of all pairs of a clip.

One program takes BLOCK_C context tokens of one segment (a clip in a mask group) and walks over
the segment's predicted tokens BLOCK_P at a time, so it reads every index once from memory and the
predicted ones again from the L2: `4 (Kc + Kp) + 4 Kc` bytes a segment with int32 indices. Each
program owns its outputs and integers have no rounding, so two runs give the same bits.

Shapes: S segments, R context tokens, P predicted tokens of all segments.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ahead_of_time import Case
from ..grid import cdiv

BLOCK_C, BLOCK_P = 64, 32


@triton.jit
def _nearest(
    context_ptr, predict_ptr, context_offset_ptr, predict_offset_ptr, distance_ptr,
    height, width,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0)
    start = tl.load(context_offset_ptr + segment).to(tl.int64)
    length = tl.load(context_offset_ptr + segment + 1).to(tl.int64) - start
    first = tl.program_id(1) * BLOCK_C
    if first >= length:
        return
    place_C = first + tl.arange(0, BLOCK_C)
    in_C = place_C < length
    token_C = tl.load(context_ptr + start + place_C, mask=in_C, other=0).to(tl.int32)
    area = height * width
    t_C, h_C, w_C = token_C // area, token_C // width % height, token_C % width

    begin = tl.load(predict_offset_ptr + segment).to(tl.int64)
    end = tl.load(predict_offset_ptr + segment + 1).to(tl.int64)
    nearest_C = tl.full((BLOCK_C,), 2147483647, tl.int32)
    for low in range(begin, end, BLOCK_P):
        place_P = low + tl.arange(0, BLOCK_P)
        in_P = place_P < end
        token_P = tl.load(predict_ptr + place_P, mask=in_P, other=0).to(tl.int32)
        dt_CP = t_C[:, None] - (token_P // area)[None, :]
        dh_CP = h_C[:, None] - (token_P // width % height)[None, :]
        dw_CP = w_C[:, None] - (token_P % width)[None, :]
        square_CP = dt_CP * dt_CP + dh_CP * dh_CP + dw_CP * dw_CP
        square_CP = tl.where(in_P[None, :], square_CP, 2147483647)
        nearest_C = tl.minimum(nearest_C, tl.min(square_CP, axis=1))
    distance_C = tl.sqrt_rn(nearest_C.to(tl.float32))
    tl.store(distance_ptr + start + place_C, distance_C, mask=in_C)


def mask_distance(
    context_R: Tensor,
    predict_P: Tensor,
    context_offset: Tensor,
    predict_offset: Tensor,
    most_context: int,
    grid: tuple[int, int, int],
) -> Tensor:
    distance_R = torch.empty(context_R.shape, dtype=torch.float32, device=context_R.device)
    if context_R.numel():
        _nearest[(len(context_offset) - 1, cdiv(most_context, BLOCK_C))](
            context_R, predict_P, context_offset, predict_offset, distance_R,
            grid[1], grid[2], BLOCK_C=BLOCK_C, BLOCK_P=BLOCK_P, num_warps=4,
        )  # fmt: skip
    return distance_R


AHEAD_OF_TIME = [
    Case(
        f"nearest {index}",
        _nearest,
        {
            "context_ptr": f"*{index}", "predict_ptr": f"*{index}", "context_offset_ptr": "*i64",
            "predict_offset_ptr": "*i64", "distance_ptr": "*fp32", "height": "i32", "width": "i32",
        },
        {"BLOCK_C": BLOCK_C, "BLOCK_P": BLOCK_P},
        num_warps=4,
    )
    for index in ("i32", "i64")
]  # fmt: skip
