"""Attention over packed sequences: scores, their exponentials and their gradients stay in
registers.

`_forward`, one program a block of queries: walks over the keys of its sequence with a running
maximum and sum (online softmax) and writes out, and what turns scores into weights again.
`_gradient_of_queries`, the same grid: forms `delta = sum_c out dout` of its rows, which it leaves
for the next kernel, makes the weights anew and sums dq. `_gradient_of_keys`, one program a block
of keys: walks over the queries and sums dk and dv. The backward takes seven products of tiles in
place of the five that one kernel would need, but writes each number once: no kernel adds floats
atomically, sums have a fixed order, two runs give the same bits. Scores are made transposed for
dk and dv, so that weights go from the registers they were made in straight into the next product
in all three kernels.

With few channels a head it is the exponentials and what surrounds them that take the time, so
there is little of that: the factor of exp2 is folded into one multiply-add, the tensor cores add
up the weights, scale factors of gradients wait for the last step, and only the last tile of a
sequence is masked.

Bytes: out `4 C` elements and 4 bytes a row and head, plus keys and values again for each block of
queries, which the L2 holds. Grid: blocks of the longest sequence x heads x sequences; blocks
beyond the end of a sequence return at once. Numbers that change from step to step are not
specialised: new lengths never compile anew.

Shapes: R rows of all sequences, Q queries and K keys of a tile, H heads, C head channels. What is
kept of the forward is the shift [H, R] that makes a row's exponentials weights: with `factor`
for log2(e) / sqrt(C), `weight = exp2(factor score + shift)`. `pair` [H, R, 2] is shift and delta.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ahead_of_time import Case
from ..grid import cdiv, next_power_of_2


@dataclass(frozen=True)
class Tile:
    """Rows that a program owns and rows it takes at a time, its warps and loads in flight, and the
    most registers of a thread, if they are to be fewer than the compiler would take."""

    own: int
    step: int
    warps: int
    stages: int
    registers: int | None = None


@dataclass(frozen=True)
class Tiles:
    """How the three kernels are launched."""

    forward: Tile
    queries: Tile
    keys: Tile


# By channels, rounded up to a power of two: for GPUs whose products are a warp group's (9.0 and
# newer), and for older ones.
TILES = {
    16: Tiles(Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
    32: Tiles(Tile(64, 64, 4, 3), Tile(128, 32, 4, 3), Tile(64, 64, 4, 3, 168)),
    64: Tiles(Tile(64, 64, 4, 3), Tile(64, 32, 4, 3), Tile(64, 32, 4, 3)),
    128: Tiles(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
}
OLDER_TILES = {
    16: Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
    32: Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
    64: Tiles(Tile(64, 64, 4, 3), Tile(64, 32, 4, 3), Tile(64, 32, 4, 3)),
    128: Tiles(Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(128, 16, 8, 2)),
}

LOG2_E = math.log2(math.e)
# Columns of ones that add up the weights; the fewest that a product takes.
SUMS = 8
_CHANGING = ["blocks", "rows"]


@triton.jit
def _place(starts_ptr, blocks, HEADS: tl.constexpr, OWN: tl.constexpr):
    """First row and length of this program's sequence, its head, and where its block begins."""
    program = tl.program_id(0)
    sequence = program // (blocks * HEADS)
    start = tl.load(starts_ptr + sequence)
    length = tl.load(starts_ptr + sequence + 1) - start
    head = (program // blocks % HEADS).to(tl.int64)
    return start.to(tl.int64), length, head, program % blocks * OWN


@triton.jit
def _load(
    ptr, stride, left,
    ROWS: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """ROWS rows of C channels; 0 beyond C and, unless the tile is WHOLE, from row `left` on."""
    row_R, c_C = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_C)[None, :]
    place_RC = ptr + row_R.to(tl.int64) * stride + c_C
    if WHOLE and C == BLOCK_C:
        x_RC = tl.load(place_RC)
    elif WHOLE:
        x_RC = tl.load(place_RC, mask=c_C < C, other=0.0)
    else:
        x_RC = tl.load(place_RC, mask=(row_R < left) & (c_C < C), other=0.0)
    return x_RC


@triton.jit
def _store(
    ptr, stride, left, x_RC, ROWS: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    row_R, c_C = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_C)[None, :]
    inside_RC = (row_R < left) & (c_C < C)
    place_RC = ptr + row_R.to(tl.int64) * stride + c_C
    tl.store(place_RC, x_RC.to(ptr.dtype.element_ty), mask=inside_RC)


@triton.jit
def _attend(
    q_QC, k_ptr, v_ptr, k_r, v_r, most_Q, sum_QS, out_QC, row, left, factor,
    SUMS: tl.constexpr, STEP: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile of keys more: the new maxima of raw scores, sums of weights, weighted values."""
    k_KC = _load(k_ptr + row * k_r, k_r, left, STEP, C, BLOCK_C, WHOLE)
    score_QK = tl.dot(q_QC, tl.trans(k_KC), input_precision="ieee")
    if not WHOLE:
        score_QK = tl.where(tl.arange(0, STEP)[None, :] < left, score_QK, float("-inf"))
    new_Q = tl.maximum(most_Q, tl.max(score_QK, 1))
    weight_QK = tl.exp2(tl.fma(score_QK, factor, -(new_Q * factor)[:, None]))
    shrink_Q = tl.exp2((most_Q - new_Q) * factor)
    v_KC = _load(v_ptr + row * v_r, v_r, left, STEP, C, BLOCK_C, WHOLE)
    weight_QK = weight_QK.to(v_KC.dtype)
    out_QC = tl.dot(weight_QK, v_KC, out_QC * shrink_Q[:, None], input_precision="ieee")
    # The tensor cores add up the weights, too: every column of the sums is the same.
    ones_KS = tl.full((STEP, SUMS), 1.0, v_KC.dtype)
    sum_QS = tl.dot(weight_QK, ones_KS, sum_QS * shrink_Q[:, None], input_precision="ieee")
    return new_Q, sum_QS, out_QC


@triton.jit(do_not_specialize=_CHANGING)
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, shift_ptr, starts_ptr,
    q_r, q_h, k_r, k_h, v_r, v_h, factor, blocks, rows,
    HEADS: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr,
    OWN: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    start, length, head, block = _place(starts_ptr, blocks, HEADS, OWN)
    if block >= length:
        return
    own, left = start + block, length - block
    k_ptr += head * k_h
    v_ptr += head * v_h
    q_QC = _load(
        q_ptr + own * q_r + head * q_h, q_r, left, OWN, C, BLOCK_C, False
    )  # fmt: skip
    most_Q = tl.full((OWN,), float("-inf"), tl.float32)
    sum_QS = tl.zeros((OWN, SUMS), tl.float32)
    out_QC = tl.zeros((OWN, BLOCK_C), tl.float32)
    whole = length // STEP * STEP
    for first in tl.range(0, whole, STEP, num_stages=STAGES):
        most_Q, sum_QS, out_QC = _attend(
            q_QC, k_ptr, v_ptr, k_r, v_r, most_Q, sum_QS, out_QC, start + first, 0, factor,
            SUMS, STEP, C, BLOCK_C, True,
        )  # fmt: skip
    if whole < length:
        most_Q, sum_QS, out_QC = _attend(
            q_QC, k_ptr, v_ptr, k_r, v_r, most_Q, sum_QS, out_QC, start + whole, length - whole,
            factor, SUMS, STEP, C, BLOCK_C, False,
        )  # fmt: skip
    sum_Q = tl.max(sum_QS, 1)
    out_ptr += (own * HEADS + head) * C
    _store(out_ptr, HEADS * C, left, out_QC / sum_Q[:, None], OWN, C, BLOCK_C)
    row_Q = tl.arange(0, OWN)
    shift_ptr += head * rows + own
    tl.store(shift_ptr + row_Q, -(most_Q * factor + tl.log2(sum_Q)), mask=row_Q < left)


@triton.jit
def _add_to_queries(
    q_QC, dout_QC, shift_Q, delta_Q, k_ptr, v_ptr, k_r, v_r, dq_QC, row, left, factor,
    STEP: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """What one tile of keys adds to dq, scale left out."""
    k_KC = _load(k_ptr + row * k_r, k_r, left, STEP, C, BLOCK_C, WHOLE)
    v_KC = _load(v_ptr + row * v_r, v_r, left, STEP, C, BLOCK_C, WHOLE)
    score_QK = tl.dot(q_QC, tl.trans(k_KC), input_precision="ieee")
    dweight_QK = tl.dot(dout_QC, tl.trans(v_KC), input_precision="ieee")
    weight_QK = tl.exp2(tl.fma(score_QK, factor, shift_Q[:, None]))
    if not WHOLE:
        weight_QK = tl.where(tl.arange(0, STEP)[None, :] < left, weight_QK, 0.0)
    dscore_QK = weight_QK * (dweight_QK - delta_Q[:, None])
    return tl.dot(dscore_QK.to(k_KC.dtype), k_KC, dq_QC, input_precision="ieee")


@triton.jit(do_not_specialize=_CHANGING)
def _gradient_of_queries(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, shift_ptr, pair_ptr, dq_ptr, starts_ptr,
    q_r, q_h, k_r, k_h, v_r, v_h, dout_r, dout_h, factor, scale, blocks, rows,
    HEADS: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr,
    OWN: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    start, length, head, block = _place(starts_ptr, blocks, HEADS, OWN)
    if block >= length:
        return
    own, left = start + block, length - block
    k_ptr += head * k_h
    v_ptr += head * v_h
    q_QC = _load(
        q_ptr + own * q_r + head * q_h, q_r, left, OWN, C, BLOCK_C, False
    )  # fmt: skip
    dout_ptr += own * dout_r + head * dout_h
    dout_QC = _load(dout_ptr, dout_r, left, OWN, C, BLOCK_C, False)
    ours = (own * HEADS + head) * C
    out_QC = _load(out_ptr + ours, HEADS * C, left, OWN, C, BLOCK_C, False)
    delta_Q = tl.sum(out_QC.to(tl.float32) * dout_QC.to(tl.float32), 1)
    row_Q = tl.arange(0, OWN)
    place_Q = head * rows + own + row_Q
    shift_Q = tl.load(shift_ptr + place_Q, mask=row_Q < left, other=float("-inf"))
    place_Q2 = place_Q[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(pair_ptr + place_Q2, tl.join(shift_Q, delta_Q), mask=(row_Q < left)[:, None])
    dq_QC = tl.zeros((OWN, BLOCK_C), tl.float32)
    whole = length // STEP * STEP
    for first in tl.range(0, whole, STEP, num_stages=STAGES):
        dq_QC = _add_to_queries(
            q_QC, dout_QC, shift_Q, delta_Q, k_ptr, v_ptr, k_r, v_r, dq_QC, start + first, 0,
            factor,
            STEP, C, BLOCK_C, True,
        )  # fmt: skip
    if whole < length:
        dq_QC = _add_to_queries(
            q_QC, dout_QC, shift_Q, delta_Q, k_ptr, v_ptr, k_r, v_r, dq_QC, start + whole,
            length - whole,
            factor, STEP, C, BLOCK_C, False,
        )  # fmt: skip
    _store(dq_ptr + ours, HEADS * C, left, dq_QC * scale, OWN, C, BLOCK_C)


@triton.jit
def _add_to_keys(
    k_KC, v_KC, q_ptr, dout_ptr, pair_ptr, q_r, dout_r, dk_KC, dv_KC, row, left,
    factor, STEP: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """What one tile of queries adds to dk, scale left out, and to dv.

    The weight of a query beyond the end is exp2(-inf)."""
    q_QC = _load(q_ptr + row * q_r, q_r, left, STEP, C, BLOCK_C, WHOLE)
    dout_QC = _load(dout_ptr + row * dout_r, dout_r, left, STEP, C, BLOCK_C, WHOLE)
    row_Q1 = tl.arange(0, STEP)[:, None]
    place_Q2 = pair_ptr + row * 2 + row_Q1 * 2 + tl.arange(0, 2)[None, :]
    if WHOLE:
        shift_Q, delta_Q = tl.split(tl.load(place_Q2))
    else:
        shift_Q, delta_Q = tl.split(tl.load(place_Q2, mask=row_Q1 < left, other=float("-inf")))
        delta_Q = tl.where(tl.arange(0, STEP) < left, delta_Q, 0.0)
    score_KQ = tl.dot(k_KC, tl.trans(q_QC), input_precision="ieee")
    dweight_KQ = tl.dot(v_KC, tl.trans(dout_QC), input_precision="ieee")
    weight_KQ = tl.exp2(tl.fma(score_KQ, factor, shift_Q[None, :]))
    dv_KC = tl.dot(weight_KQ.to(dout_QC.dtype), dout_QC, dv_KC, input_precision="ieee")
    dscore_KQ = weight_KQ * (dweight_KQ - delta_Q[None, :])
    dk_KC = tl.dot(dscore_KQ.to(q_QC.dtype), q_QC, dk_KC, input_precision="ieee")
    return dk_KC, dv_KC


@triton.jit(do_not_specialize=_CHANGING)
def _gradient_of_keys(
    q_ptr, k_ptr, v_ptr, dout_ptr, pair_ptr, dk_ptr, dv_ptr, starts_ptr,
    q_r, q_h, k_r, k_h, v_r, v_h, dout_r, dout_h, factor, scale, blocks, rows,
    HEADS: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr,
    OWN: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    start, length, head, block = _place(starts_ptr, blocks, HEADS, OWN)
    if block >= length:
        return
    own, left = start + block, length - block
    k_KC = _load(k_ptr + own * k_r + head * k_h, k_r, left, OWN, C, BLOCK_C, False)
    v_KC = _load(v_ptr + own * v_r + head * v_h, v_r, left, OWN, C, BLOCK_C, False)
    q_ptr += head * q_h
    dout_ptr += head * dout_h
    pair_ptr += head * rows * 2
    dk_KC = tl.zeros((OWN, BLOCK_C), tl.float32)
    dv_KC = tl.zeros((OWN, BLOCK_C), tl.float32)
    whole = length // STEP * STEP
    for first in tl.range(0, whole, STEP, num_stages=STAGES):
        dk_KC, dv_KC = _add_to_keys(
            k_KC, v_KC, q_ptr, dout_ptr, pair_ptr, q_r, dout_r, dk_KC, dv_KC, start + first, 0,
            factor, STEP, C, BLOCK_C, True,
        )  # fmt: skip
    if whole < length:
        dk_KC, dv_KC = _add_to_keys(
            k_KC, v_KC, q_ptr, dout_ptr, pair_ptr, q_r, dout_r, dk_KC, dv_KC, start + whole,
            length - whole, factor, STEP, C, BLOCK_C, False,
        )  # fmt: skip
    ours = (own * HEADS + head) * C
    _store(dk_ptr + ours, HEADS * C, left, dk_KC * scale, OWN, C, BLOCK_C)
    _store(dv_ptr + ours, HEADS * C, left, dv_KC, OWN, C, BLOCK_C)


def tiles_for(channels: int, device: torch.device) -> Tiles:
    """The launch constants for heads of `channels` channels."""
    return (OLDER_TILES if _is_older(device) else TILES)[_block_c(channels)]


@functools.cache
def _is_older(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0)


def forward(
    q_RHC: Tensor, k_RHC: Tensor, v_RHC: Tensor, starts_B1: Tensor, longest: int,
    out_RHC: Tensor, shift_HR: Tensor, tile: Tile | None = None, sums: int = SUMS,
) -> None:  # fmt: skip
    """Write out and shift. Channels lie side by side, `out` is contiguous."""
    rows, heads, channels = q_RHC.shape
    tile = tile or tiles_for(channels, q_RHC.device).forward
    blocks = cdiv(longest, tile.own)
    _forward[(blocks * heads * (len(starts_B1) - 1),)](
        q_RHC, k_RHC, v_RHC, out_RHC, shift_HR, starts_B1,
        *q_RHC.stride()[:2], *k_RHC.stride()[:2], *v_RHC.stride()[:2],
        LOG2_E * channels**-0.5, blocks, rows,
        HEADS=heads, C=channels, SUMS=sums,
        **_constants(channels, tile), num_warps=tile.warps, maxnreg=tile.registers,
    )  # fmt: skip


def gradient_of_queries(
    dout_RHC: Tensor, q_RHC: Tensor, k_RHC: Tensor, v_RHC: Tensor, out_RHC: Tensor,
    shift_HR: Tensor, starts_B1: Tensor, longest: int, dq_RHC: Tensor, pair_HR2: Tensor,
    tile: Tile | None = None,
) -> None:  # fmt: skip
    """Write dq, contiguous, and the pairs that `gradient_of_keys` needs."""
    rows, heads, channels = q_RHC.shape
    tile = tile or tiles_for(channels, q_RHC.device).queries
    blocks, scale = cdiv(longest, tile.own), channels**-0.5
    _gradient_of_queries[(blocks * heads * (len(starts_B1) - 1),)](
        q_RHC, k_RHC, v_RHC, out_RHC, dout_RHC, shift_HR, pair_HR2, dq_RHC, starts_B1,
        *q_RHC.stride()[:2], *k_RHC.stride()[:2], *v_RHC.stride()[:2], *dout_RHC.stride()[:2],
        LOG2_E * scale, scale, blocks, rows,
        HEADS=heads, C=channels, **_constants(channels, tile), num_warps=tile.warps,
        maxnreg=tile.registers,
    )  # fmt: skip


def gradient_of_keys(
    dout_RHC: Tensor, q_RHC: Tensor, k_RHC: Tensor, v_RHC: Tensor, pair_HR2: Tensor,
    starts_B1: Tensor, longest: int, dk_RHC: Tensor, dv_RHC: Tensor, tile: Tile | None = None,
) -> None:  # fmt: skip
    """Write dk and dv, both contiguous."""
    rows, heads, channels = q_RHC.shape
    tile = tile or tiles_for(channels, q_RHC.device).keys
    blocks, scale = cdiv(longest, tile.own), channels**-0.5
    _gradient_of_keys[(blocks * heads * (len(starts_B1) - 1),)](
        q_RHC, k_RHC, v_RHC, dout_RHC, pair_HR2, dk_RHC, dv_RHC, starts_B1,
        *q_RHC.stride()[:2], *k_RHC.stride()[:2], *v_RHC.stride()[:2], *dout_RHC.stride()[:2],
        LOG2_E * scale, scale, blocks, rows,
        HEADS=heads, C=channels, **_constants(channels, tile), num_warps=tile.warps,
        maxnreg=tile.registers,
    )  # fmt: skip


def _block_c(channels: int) -> int:
    return next_power_of_2(channels)


def _constants(channels: int, tile: Tile) -> dict[str, int]:
    return {
        "BLOCK_C": _block_c(channels), "OWN": tile.own, "STEP": tile.step, "STAGES": tile.stages
    }  # fmt: skip


def _case(
    kernel: Any, heads: int, channels: int, dtype: str, tile: Tile, capabilities: tuple[int, int]
) -> Case:
    arrays = [name for name in kernel.arg_names if name.endswith("_ptr")]
    strides = [name for name in kernel.arg_names if name.endswith(("_r", "_h"))]
    types = {
        **dict.fromkeys(arrays, f"*{dtype}"), **dict.fromkeys(strides, "i32"),
        "shift_ptr": "*fp32", "pair_ptr": "*fp32", "starts_ptr": "*i32",
        "factor": "fp32", "scale": "fp32", "blocks": "i32", "rows": "i32",
    }  # fmt: skip
    constants = {"HEADS": heads, "C": channels, **_constants(channels, tile)}
    if kernel is _forward:
        constants["SUMS"] = SUMS
    return Case(
        f"{kernel.fn.__name__.removeprefix('_').replace('_', ' ')} {heads}x{channels} {dtype}",
        kernel,
        {name: types[name] for name in kernel.arg_names if name in types},
        constants,
        num_warps=tile.warps,
        divisible_by_16=(*arrays, *strides),
        capabilities=capabilities,
        registers=tile.registers,
    )


# The predictor, ViT-L, the ends of what is taken, a head width that is no power of two.
HEADS = ((12, 32), (16, 64), (8, 128), (16, 80))

AHEAD_OF_TIME = [
    _case(kernel, heads, channels, "bf16", getattr(table[_block_c(channels)], part), capabilities)
    for table, capabilities in ((TILES, (90, 999)), (OLDER_TILES, (80, 89)))
    for kernel, part in (
        (_forward, "forward"), (_gradient_of_queries, "queries"), (_gradient_of_keys, "keys")
    )
    for heads, channels in HEADS
]  # fmt: skip
