"""Rotary positions on the packed qkv: one program a token, its angles loaded once for all heads.

A token's q and k (and v, when the output is another tensor) are `2 H` (or `3 H`) rows of C
channels. A program walks over them BLOCK_R rows at a time: a tile's channels are loaded side by
side, split in registers into pairs, turned in the table's dtype (float32; float64 for float64
qkv) and joined again. Bytes a token: out of place `2 * 3 H C` elements, in place `2 * 2 H C`, and
`4 C` of the table, which the L2 holds when tokens of several clips share its rows; with an index
its 4 or 8 bytes. A tile has 1024 elements on 64 threads: two loads of 16 bytes a thread in half
precision, and blocks small enough that many fit a multiprocessor and hide each other's latency.

`_pack`, the gradient's, also sums over the rows: its programs walk over many rows each, and their
sums are added up in one more, small pass. The order is fixed: two runs give the same bits.

Shapes: B clips, N tokens, M table rows, H heads, C head channels.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..ahead_of_time import Case
from ..grid import cdiv, next_power_of_2

TILE, NUM_WARPS = 1024, 2
# Where rows are summed over: programs that walk over many rows, and their warps.
PROGRAMS, PACK_WARPS = 1056, 4


@triton.jit
def _turned(x_RC, cos_P, sin_P, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Channel pairs of rows turned, in x's dtype."""
    even_RP, odd_RP = tl.split(tl.reshape(x_RC.to(cos_P.dtype), (BLOCK_R, BLOCK_C // 2, 2)))
    turned_RP2 = tl.join(even_RP * cos_P - odd_RP * sin_P, odd_RP * cos_P + even_RP * sin_P)
    return tl.reshape(turned_RP2, (BLOCK_R, BLOCK_C)).to(x_RC.dtype)


@triton.jit
def _turn(
    x_ptr, table_ptr, index_ptr, out_ptr,
    num_tokens,
    x_b, x_n, x_3, x_h, out_b, out_n, out_3, out_h, table_b, table_m, index_b, index_n,
    HEADS: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, INDEXED: tl.constexpr,
    INVERSE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    b, n = program // num_tokens, program % num_tokens
    place = tl.load(index_ptr + b * index_b + n * index_n).to(tl.int64) if INDEXED else n
    c_C = tl.arange(0, BLOCK_C)[None, :]
    table_C = tl.load(table_ptr + b * table_b + place * table_m + c_C, mask=c_C < C, other=0.0)
    cos_P, sin_P = tl.split(tl.reshape(table_C, (1, BLOCK_C // 2, 2)))
    if INVERSE:
        sin_P = -sin_P
    for first in range(0, ROWS, BLOCK_R):
        row_R = first + tl.arange(0, BLOCK_R)[:, None]
        in_RC = (row_R < ROWS) & (c_C < C)
        part_R, head_R = (row_R // HEADS).to(tl.int64), (row_R % HEADS).to(tl.int64)
        x_RC = tl.load(
            x_ptr + b * x_b + n * x_n + part_R * x_3 + head_R * x_h + c_C, mask=in_RC, other=0.0
        )
        y_RC = tl.where(row_R < 2 * HEADS, _turned(x_RC, cos_P, sin_P, BLOCK_R, BLOCK_C), x_RC)
        tl.store(
            out_ptr + b * out_b + n * out_n + part_R * out_3 + head_R * out_h + c_C,
            y_RC, mask=in_RC,
        )  # fmt: skip


@triton.jit
def _parts(
    dq_ptr, dk_ptr, dv_ptr, table_ptr, n, num_rows, head_H, c_C,
    q_n, q_h, k_n, k_h, v_n, v_h, table_n,
    HEADS: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Row n of the three gradients, and its cos and sin; zeros beyond the last."""
    n_1 = (n + tl.arange(0, 1)[:, None]).to(tl.int64)
    in_HC = (n_1 < num_rows) & (c_C < C) & (head_H < HEADS)
    q_HC = tl.load(dq_ptr + n_1 * q_n + head_H * q_h + c_C, mask=in_HC, other=0.0)
    k_HC = tl.load(dk_ptr + n_1 * k_n + head_H * k_h + c_C, mask=in_HC, other=0.0)
    v_HC = tl.load(dv_ptr + n_1 * v_n + head_H * v_h + c_C, mask=in_HC, other=0.0)
    pair_P = tl.arange(0, BLOCK_C // 2)[None, :] * 2
    in_P = (n_1 < num_rows) & (pair_P < C)
    cos_P = tl.load(table_ptr + n_1 * table_n + pair_P, mask=in_P, other=0.0)
    sin_P = tl.load(table_ptr + n_1 * table_n + pair_P + 1, mask=in_P, other=0.0)
    return q_HC, k_HC, v_HC, cos_P, sin_P


@triton.jit(do_not_specialize=["num_rows"])
def _pack(
    dq_ptr, dk_ptr, dv_ptr, table_ptr, out_ptr, sums_ptr, num_rows,
    q_n, q_h, k_n, k_h, v_n, v_h, table_n, out_n, out_3, out_h,
    HEADS: tl.constexpr, C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    head_H = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    c_C = tl.arange(0, BLOCK_C)[None, :]
    in_HC = (head_H < HEADS) & (c_C < C)
    q_sum_HC = tl.zeros((BLOCK_H, BLOCK_C), sums_ptr.dtype.element_ty)
    k_sum_HC = tl.zeros((BLOCK_H, BLOCK_C), sums_ptr.dtype.element_ty)
    v_sum_HC = tl.zeros((BLOCK_H, BLOCK_C), sums_ptr.dtype.element_ty)
    first, step = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    next_q, next_k, next_v, next_cos, next_sin = _parts(
        dq_ptr, dk_ptr, dv_ptr, table_ptr, first, num_rows, head_H, c_C,
        q_n, q_h, k_n, k_h, v_n, v_h, table_n, HEADS, C, BLOCK_C,
    )  # fmt: skip
    for n in range(first, num_rows, step):
        # The next row is on its way while this one is turned.
        q_HC, k_HC, v_HC, cos_P, sin_P = next_q, next_k, next_v, next_cos, next_sin
        next_q, next_k, next_v, next_cos, next_sin = _parts(
            dq_ptr, dk_ptr, dv_ptr, table_ptr, n + step, num_rows, head_H, c_C,
            q_n, q_h, k_n, k_h, v_n, v_h, table_n, HEADS, C, BLOCK_C,
        )  # fmt: skip
        q_HC = _turned(q_HC, cos_P, -sin_P, BLOCK_H, BLOCK_C)
        k_HC = _turned(k_HC, cos_P, -sin_P, BLOCK_H, BLOCK_C)
        out_HC = out_ptr + n * out_n + head_H * out_h + c_C
        tl.store(out_HC, q_HC, mask=in_HC)
        tl.store(out_HC + out_3, k_HC, mask=in_HC)
        tl.store(out_HC + 2 * out_3, v_HC, mask=in_HC)
        q_sum_HC += q_HC
        k_sum_HC += k_HC
        v_sum_HC += v_HC
    sums_HC = sums_ptr + tl.program_id(0).to(tl.int64) * (3 * HEADS * C) + head_H * C + c_C
    tl.store(sums_HC, q_sum_HC, mask=in_HC)
    tl.store(sums_HC + HEADS * C, k_sum_HC, mask=in_HC)
    tl.store(sums_HC + 2 * HEADS * C, v_sum_HC, mask=in_HC)


def rope3d(
    x_BN3HC: Tensor,
    table_BMC: Tensor,
    index_BN: Tensor | None,
    out_BN3HC: Tensor,
    inverse: bool,
) -> None:
    """Write x turned to `out`; v is left alone if `out` is x itself. Channels lie side by side."""
    clips, tokens, _, heads, channels = x_BN3HC.shape
    block_c = next_power_of_2(channels)
    _turn[(clips * tokens,)](
        x_BN3HC, table_BMC, index_BN, out_BN3HC,
        tokens,
        *x_BN3HC.stride()[:4], *out_BN3HC.stride()[:4], *table_BMC.stride()[:2],
        *((0, 0) if index_BN is None else index_BN.stride()),
        HEADS=heads, C=channels, ROWS=(2 if out_BN3HC is x_BN3HC else 3) * heads,
        INDEXED=index_BN is not None, INVERSE=inverse,
        BLOCK_R=_rows_of_a_tile(3 * heads, block_c), BLOCK_C=block_c, num_warps=NUM_WARPS,
    )  # fmt: skip


def pack(
    dq_RHC: Tensor, dk_RHC: Tensor, dv_RHC: Tensor, table_RC: Tensor, out_R3HC: Tensor
) -> Tensor:
    """Write dq and dk, turned back, and dv side by side; return the sums over rows [3, H, C] in
    the table's dtype. Channels lie side by side in all."""
    rows, heads, channels = dq_RHC.shape
    block_c = next_power_of_2(channels)
    block_h = _rows_of_a_tile(heads, block_c)
    programs = min(PROGRAMS, rows)
    sums = table_RC.new_empty((programs, 3, heads, channels))
    _pack[(programs, cdiv(heads, block_h))](
        dq_RHC, dk_RHC, dv_RHC, table_RC, out_R3HC, sums, rows,
        *dq_RHC.stride()[:2], *dk_RHC.stride()[:2], *dv_RHC.stride()[:2], table_RC.stride(0),
        *out_R3HC.stride()[:3], HEADS=heads, C=channels, BLOCK_H=block_h, BLOCK_C=block_c,
        num_warps=PACK_WARPS,
    )  # fmt: skip
    return sums.sum(0)


def _rows_of_a_tile(rows: int, block_c: int) -> int:
    return min(max(TILE // block_c, 1), next_power_of_2(rows))


def _case(
    name: str, heads: int, channels: int, dtype: str, index: str | None, rows: int, inverse: bool
) -> Case:
    block_c = next_power_of_2(channels)
    strides = ("x_b", "x_n", "x_3", "x_h", "out_b", "out_n", "out_3", "out_h", "table_b", "table_m")
    signature: dict[str, Any] = {
        "x_ptr": f"*{dtype}", "table_ptr": "*fp64" if dtype == "fp64" else "*fp32",
        "out_ptr": f"*{dtype}", "num_tokens": "i32", "index_b": "i32", "index_n": "i32",
        **dict.fromkeys(strides, "i32"),
    }  # fmt: skip
    constants: dict[str, Any] = {
        "HEADS": heads, "C": channels, "ROWS": rows * heads, "INDEXED": index is not None,
        "INVERSE": inverse, "BLOCK_R": _rows_of_a_tile(3 * heads, block_c), "BLOCK_C": block_c,
    }  # fmt: skip
    if index is None:
        constants["index_ptr"] = None
    else:
        signature["index_ptr"] = f"*{index}"
    return Case(
        f"{name} {heads}x{channels} {dtype} {index or 'in order'}",
        _turn,
        signature,
        constants,
        num_warps=NUM_WARPS,
        divisible_by_16=("x_ptr", "table_ptr", "out_ptr", *strides),
    )


# ViT-L, ViT-g, ViT-G, the predictor, and a head width that is no power of two.
HEADS = ((16, 64), (22, 64), (26, 64), (12, 32), (16, 48))
KINDS = (("forward", 3, False), ("in place", 2, False), ("backward", 3, True))


def _pack_case(heads: int, channels: int) -> Case:
    strides = ("q_n", "q_h", "k_n", "k_h", "v_n", "v_h", "table_n", "out_n", "out_3", "out_h")
    pointers = ("dq_ptr", "dk_ptr", "dv_ptr", "out_ptr")
    block_c = next_power_of_2(channels)
    signature = {
        **dict.fromkeys(pointers, "*bf16"), "table_ptr": "*fp32", "sums_ptr": "*fp32",
        "num_rows": "i32", **dict.fromkeys(strides, "i32"),
    }  # fmt: skip
    constants = {
        "HEADS": heads, "C": channels, "BLOCK_H": _rows_of_a_tile(heads, block_c),
        "BLOCK_C": block_c,
    }  # fmt: skip
    return Case(
        f"packed gradient {heads}x{channels}", _pack, signature, constants, num_warps=PACK_WARPS,
        divisible_by_16=(*pointers, "table_ptr", "sums_ptr", *strides),
    )  # fmt: skip


AHEAD_OF_TIME = [_pack_case(heads, channels) for heads, channels in HEADS] + [
    _case(name, heads, channels, dtype, index, rows, inverse)
    for name, rows, inverse in KINDS
    for heads, channels, dtype, index in (
        *((*heads, "bf16", None) for heads in HEADS),
        *((16, 64, dtype, "i64") for dtype in ("fp32", "fp16", "fp64")),
        (16, 64, "bf16", "i32"),
    )
]
