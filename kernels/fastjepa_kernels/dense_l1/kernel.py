"""The dense loss in one pass: read a prediction and its raw target row, write its gradient.

`_compare`, one program a row: for each level it reads D numbers of the target row named by the
row's index and D of the prediction, normalises in registers (mean first, then the centred squares),
adds up the losses and writes D numbers of gradient. Per row `L D (z + y + dz)` bytes, 32 KiB for
ViT-L with a bfloat16 prediction and float32 targets, and L float32 sums; a normalised target, the
difference and its sign never exist in memory, and targets that no row names are not read. Grid: R
programs. Each thread holds 8 or 16 numbers of a row, so that it has two to four loads of 16 bytes
in flight before the first sum needs them; the levels of a row share its index and weights.
`_add_up` and `_finish` turn the sums, 4 L bytes a row, into terms and total: SPLITS programs a
group and level in fixed strides, then one program in a fixed order.
`_scale` multiplies a stored gradient by a scalar of the device. A fixed number of programs walk
over its tiles, so where the scalar is 1 all of them return after one load.

Every number is written by one program and sums have a fixed order: two runs give the same bits.

Group bounds arrive as a tuple of numbers that no specialisation matches (odd, 3 or more), so new
sizes every step never recompile.

Shapes: R all rows, r those of this call, E = L D channels, L levels, D width, G mask groups.
"""

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..ahead_of_time import Case
from ..grid import cdiv, next_power_of_2
from .comparison import Comparison

SPLITS, BLOCK_ROWS = 16, 1024
SCALE_BLOCK, SCALE_PROGRAMS, SCALE_WARPS = 4096, 2048, 8


@triton.jit
def _normalize(x_D, inside_D, WIDTH: tl.constexpr, eps):
    """(x - mean) / deviation, 0 beyond WIDTH, and 1 / deviation."""
    centred_D = tl.where(inside_D, x_D - tl.sum(x_D, 0) / WIDTH, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred_D * centred_D, 0) / WIDTH + eps)
    return centred_D * inverse, inverse


@triton.jit
def _loss_and_slope(diff_D, smooth, EXPONENT: tl.constexpr, SMOOTH: tl.constexpr):
    """f(diff) times EXPONENT, and f'(diff), which is 0 at 0."""
    size_D = tl.abs(diff_D)
    sign_D = tl.where(diff_D > 0.0, 1.0, tl.where(diff_D < 0.0, -1.0, 0.0))
    if SMOOTH:
        # With c = |diff| cut at smooth the loss is c (|diff| - c / 2) / smooth on both sides.
        cut_D = tl.minimum(size_D, smooth)
        return cut_D * (size_D - 0.5 * cut_D) / smooth, sign_D * (cut_D / smooth)
    if EXPONENT == 1.0:
        return size_D, sign_D
    if EXPONENT == 2.0:
        return diff_D * diff_D, diff_D
    positive_D = tl.where(size_D > 0.0, size_D, 1.0)
    power_D = tl.exp2((EXPONENT - 1.0) * tl.log2(positive_D))
    return power_D * size_D, power_D * sign_D


@triton.jit(do_not_specialize=["first"])
def _compare(
    z_ptr, dz_ptr, targets, row_ptr, token_weight_ptr, group_factor_ptr, sums_ptr,
    z_stride, dz_stride, target_strides, num_rows, first,
    group_bounds, group_slopes, level_weights, smooth, eps,
    GROUPS: tl.constexpr, LEVELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    EXPONENT: tl.constexpr, SMOOTH: tl.constexpr, NORMALIZE_TARGET: tl.constexpr,
    NORMALIZE_PREDICTION: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0).to(tl.int64)
    row = first + own
    index = tl.load(row_ptr + row).to(tl.int64)
    slope, group = group_slopes[0], 0
    for number in tl.static_range(1, GROUPS):
        beyond = 2 * row + 3 >= group_bounds[number - 1]
        slope = tl.where(beyond, group_slopes[number], slope)
        group = tl.where(beyond, number, group)
    if group_factor_ptr is not None:
        slope *= tl.load(group_factor_ptr + group).to(tl.float32)
    if token_weight_ptr is not None:
        slope *= tl.load(token_weight_ptr + row).to(tl.float32)

    z_ptr += own * z_stride
    if ALIGNED:
        z_ptr = tl.multiple_of(z_ptr, 16)
    if dz_ptr is not None:
        dz_ptr += own * dz_stride
        if ALIGNED:
            dz_ptr = tl.multiple_of(dz_ptr, 16)
    d_D = tl.arange(0, BLOCK_D)
    inside_D = d_D < WIDTH
    for level in tl.static_range(LEVELS):
        y_ptr = targets[level] + index * target_strides[level]
        if ALIGNED:
            y_ptr = tl.multiple_of(y_ptr, 16)
        y_D = tl.load(y_ptr + d_D, mask=inside_D, other=0.0).to(tl.float32)
        z_D = tl.load(z_ptr + level * WIDTH + d_D, mask=inside_D, other=0.0).to(tl.float32)
        if NORMALIZE_TARGET:
            y_D, _ = _normalize(y_D, inside_D, WIDTH, eps)
        if NORMALIZE_PREDICTION:
            z_D, inverse = _normalize(z_D, inside_D, WIDTH, eps)
        loss_D, slope_D = _loss_and_slope(z_D - y_D, smooth, EXPONENT, SMOOTH)
        tl.store(sums_ptr + level * num_rows + row, tl.sum(loss_D, 0))
        if dz_ptr is not None:
            dz_D = slope_D * (slope * level_weights[level])
            if NORMALIZE_PREDICTION:
                along = tl.sum(dz_D * z_D, 0) / WIDTH
                dz_D = (dz_D - tl.sum(dz_D, 0) / WIDTH - z_D * along) * inverse
            dz_D = dz_D.to(dz_ptr.dtype.element_ty)
            tl.store(dz_ptr + level * WIDTH + d_D, dz_D, mask=inside_D)


@triton.jit(do_not_specialize=["num_rows"])
def _add_up(
    sums_ptr, token_weight_ptr, parts_ptr, num_rows, group_bounds,
    GROUPS: tl.constexpr, LEVELS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    group, level, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end = num_rows.to(tl.int64) * 0, num_rows.to(tl.int64)
    for number in tl.static_range(GROUPS):
        bound = (group_bounds[number].to(tl.int64) - 3) // 2
        start = tl.where(number == group - 1, bound, start)
        end = tl.where(number == group, bound, end)
    sum_R = tl.zeros((BLOCK_ROWS,), tl.float32)
    for low in range(start + split * BLOCK_ROWS, end, SPLITS * BLOCK_ROWS):
        row_R = low + tl.arange(0, BLOCK_ROWS)
        inside_R = row_R < end
        part_R = tl.load(sums_ptr + level * num_rows.to(tl.int64) + row_R, mask=inside_R, other=0.0)
        if token_weight_ptr is not None:
            part_R *= tl.load(token_weight_ptr + row_R, mask=inside_R, other=0.0).to(tl.float32)
        sum_R += part_R
    tl.store(parts_ptr + (group * LEVELS + level) * SPLITS + split, tl.sum(sum_R, 0))


@triton.jit
def _finish(
    parts_ptr, terms_ptr, total_ptr, group_factor_ptr, group_means, group_weights, level_weights,
    GROUPS: tl.constexpr, LEVELS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    term_T = tl.arange(0, BLOCK_T)
    inside_T = term_T < GROUPS * LEVELS
    place_TS = term_T[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :]
    part_TS = tl.load(parts_ptr + place_TS, mask=inside_T[:, None], other=0.0)
    mean_T = tl.zeros((BLOCK_T,), tl.float32)
    weight_T = tl.zeros((BLOCK_T,), tl.float32)
    beta_T = tl.zeros((BLOCK_T,), tl.float32)
    for group in tl.static_range(GROUPS):
        mean_T = tl.where(term_T // LEVELS == group, group_means[group], mean_T)
        weight_T = tl.where(term_T // LEVELS == group, group_weights[group], weight_T)
    for level in tl.static_range(LEVELS):
        beta_T = tl.where(term_T % LEVELS == level, level_weights[level], beta_T)
    if group_factor_ptr is not None:
        factor_T = tl.load(group_factor_ptr + term_T // LEVELS, mask=inside_T, other=0.0)
        weight_T *= factor_T.to(tl.float32)
    term_value_T = tl.sum(part_TS, 1) * mean_T
    tl.store(terms_ptr + term_T, term_value_T, mask=inside_T)
    tl.store(total_ptr, tl.sum(term_value_T * weight_T * beta_T, 0))


@triton.jit(do_not_specialize=["rows", "columns"])
def _scale(
    stored_ptr, out_ptr, upstream_ptr, factor, stored_stride, out_stride, rows, columns,
    IN_PLACE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    number = tl.load(upstream_ptr).to(tl.float32) * factor
    if IN_PLACE and number == 1.0:
        return
    tiles = tl.cdiv(columns, BLOCK).to(tl.int64)
    first, step = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    for tile in range(first, tiles * rows, step):
        row, start = tile // tiles, tile % tiles * BLOCK
        place = start + tl.arange(0, BLOCK)
        own_ptr, own_out_ptr = stored_ptr + row * stored_stride, out_ptr + row * out_stride
        if ALIGNED:
            own_ptr, own_out_ptr = tl.multiple_of(own_ptr, 16), tl.multiple_of(own_out_ptr, 16)
        value = tl.load(own_ptr + place, mask=place < columns, other=0.0).to(tl.float32)
        value = (value * number).to(out_ptr.dtype.element_ty)
        tl.store(own_out_ptr + place, value, mask=place < columns)


def _bounds(sizes: list[int]) -> tuple[int, ...]:
    """The end of each group, as 2 end + 3: odd and never 1."""
    return tuple(2 * sum(sizes[: group + 1]) + 3 for group in range(len(sizes)))


def _is_aligned(*tensors: Tensor | None) -> bool:
    """Whether every row of these tensors begins at a multiple of 16 bytes."""
    return all(
        tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.element_size() % 16 == 0
        for tensor in tensors
        if tensor is not None
    )


def _row_shape(width: int) -> tuple[int, int]:
    """Numbers a program holds of a row, and its warps: 8 numbers a thread, 16 of wide rows."""
    block = next_power_of_2(width)
    return block, min(max(block // 256, 1), 4 if block <= 2048 else 16)


def compare(
    comparison: Comparison,
    z_rE: Tensor,
    first: int,
    sums_RL: Tensor,
    dz_rE: Tensor | None,
    scale: float,
) -> None:
    """As in twin.py."""
    if len(z_rE) == 0:
        return
    z_rE = z_rE if z_rE.stride(1) == 1 else z_rE.contiguous()
    width, targets_MD = comparison.width, comparison.targets_MD
    block, num_warps = _row_shape(width)
    aligned = _is_aligned(z_rE, dz_rE, *targets_MD) and width * z_rE.element_size() % 16 == 0
    _compare[(len(z_rE),)](
        z_rE, dz_rE, tuple(targets_MD), comparison.row_R, comparison.token_weight_R,
        comparison.group_factor_G, sums_RL,
        z_rE.stride(0), 0 if dz_rE is None else dz_rE.stride(0),
        tuple(target.stride(0) for target in targets_MD), len(sums_RL), first,
        _bounds(comparison.group_sizes),
        tuple(slope * scale for slope in comparison.group_slopes()),
        tuple(comparison.level_weights), comparison.smooth, comparison.eps,
        GROUPS=len(comparison.group_sizes), LEVELS=len(targets_MD), WIDTH=width, BLOCK_D=block,
        EXPONENT=comparison.exponent, SMOOTH=comparison.smooth > 0.0,
        NORMALIZE_TARGET=comparison.normalize_target,
        NORMALIZE_PREDICTION=comparison.normalize_prediction, ALIGNED=aligned,
        num_warps=num_warps,
    )  # fmt: skip


def finish(comparison: Comparison, sums_RL: Tensor) -> tuple[Tensor, Tensor]:
    """As in twin.py."""
    groups, levels = len(comparison.group_sizes), len(comparison.targets_MD)
    parts = sums_RL.new_empty(groups * levels * SPLITS)
    terms_GL, total = sums_RL.new_empty((groups, levels)), sums_RL.new_empty(())
    _add_up[(groups, levels, SPLITS)](
        sums_RL, comparison.token_weight_R, parts, len(sums_RL), _bounds(comparison.group_sizes),
        GROUPS=groups, LEVELS=levels, SPLITS=SPLITS, BLOCK_ROWS=BLOCK_ROWS, num_warps=4,
    )  # fmt: skip
    _finish[(1,)](
        parts, terms_GL, total, comparison.group_factor_G, tuple(comparison.group_means()),
        tuple(comparison.group_weights), tuple(comparison.level_weights),
        GROUPS=groups, LEVELS=levels, SPLITS=SPLITS,
        BLOCK_T=next_power_of_2(groups * levels), num_warps=4,
    )  # fmt: skip
    return total, terms_GL


def scale(stored: Tensor, out: Tensor, upstream: Tensor, factor: float) -> None:
    """`out = stored * upstream * factor`, where `out` may be `stored`; rows may lie apart."""
    if stored.numel() == 0:
        return
    in_place = out is stored
    if stored.is_contiguous():
        stored, out = stored.view(1, -1), out.view(1, -1)
    rows, columns = stored.shape
    _scale[(min(rows * cdiv(columns, SCALE_BLOCK), SCALE_PROGRAMS),)](
        stored, out, upstream, factor, stored.stride(0), out.stride(0), rows, columns,
        IN_PLACE=in_place, ALIGNED=_is_aligned(stored, out), BLOCK=SCALE_BLOCK,
        num_warps=SCALE_WARPS,
    )  # fmt: skip


def _compare_case(
    name: str, width: int, z: str, y: str, levels: int = 4, groups: int = 4, **constants: Any
) -> Case:
    block, num_warps = _row_shape(width)
    signature = {
        "z_ptr": f"*{z}", "dz_ptr": f"*{z}", "targets": (f"*{y}",) * levels, "row_ptr": "*i64",
        "token_weight_ptr": "*fp32", "group_factor_ptr": "*fp32", "sums_ptr": "*fp32",
        "z_stride": "i32", "dz_stride": "i32", "target_strides": ("i32",) * levels,
        "num_rows": "i32", "first": "i32", "group_bounds": ("i32",) * groups,
        "group_slopes": ("fp32",) * groups, "level_weights": ("fp32",) * levels, "smooth": "fp32",
        "eps": "fp32",
    }  # fmt: skip
    usual = {
        "GROUPS": groups, "LEVELS": levels, "WIDTH": width, "BLOCK_D": block, "EXPONENT": 1.0,
        "SMOOTH": False, "NORMALIZE_TARGET": True, "NORMALIZE_PREDICTION": False, "ALIGNED": True,
    }  # fmt: skip
    given = usual | constants
    for pointer in ("dz_ptr", "token_weight_ptr", "group_factor_ptr"):
        if pointer in given:
            del signature[pointer]
    return Case(f"compare {name}", _compare, signature, given, num_warps)


def _cases() -> Iterator[Case]:
    for model, width in (("ViT-L", 1024), ("ViT-g", 1408), ("ViT-G", 1664), ("width 48", 48)):
        for z, y in (("bf16", "fp32"), ("bf16", "bf16"), ("fp32", "fp32"), ("fp16", "fp16")):
            yield _compare_case(f"{model} {z} of {y}", width, z, y)
    wide = ("ViT-G", 1664, "bf16", "fp32")
    yield _compare_case(f"{wide[0]} loss alone", *wide[1:], dz_ptr=None)
    yield _compare_case(
        f"{wide[0]} no weights", *wide[1:], token_weight_ptr=None, group_factor_ptr=None
    )
    yield _compare_case(f"{wide[0]} rows not aligned", *wide[1:], ALIGNED=False)
    yield _compare_case(f"{wide[0]} both normalised", *wide[1:], NORMALIZE_PREDICTION=True)
    yield _compare_case(f"{wide[0]} exponent 1.5", *wide[1:], EXPONENT=1.5)
    yield _compare_case("I-JEPA", 1280, "bf16", "fp32", levels=1, groups=5, SMOOTH=True)
    yield _compare_case("width 16384", 16384, "fp32", "fp32", levels=1, NORMALIZE_PREDICTION=True)
    sizes: dict[str, Any] = {"GROUPS": 4, "LEVELS": 4, "SPLITS": SPLITS}
    yield Case(
        "add up", _add_up,
        {
            "sums_ptr": "*fp32", "token_weight_ptr": "*fp32", "parts_ptr": "*fp32",
            "num_rows": "i32", "group_bounds": ("i32",) * 4,
        },
        {**sizes, "BLOCK_ROWS": BLOCK_ROWS},
    )  # fmt: skip
    yield Case(
        "finish", _finish,
        {
            "parts_ptr": "*fp32", "terms_ptr": "*fp32", "total_ptr": "*fp32",
            "group_factor_ptr": "*fp32", "group_means": ("fp32",) * 4,
            "group_weights": ("fp32",) * 4, "level_weights": ("fp32",) * 4,
        },
        {**sizes, "BLOCK_T": 16},
    )  # fmt: skip
    for dtype in ("bf16", "fp16", "fp32"):
        for in_place in (True, False):
            yield Case(
                f"scale {dtype}{' in place' * in_place}", _scale,
                {
                    "stored_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "upstream_ptr": "*fp32",
                    "factor": "fp32", "stored_stride": "i64", "out_stride": "i64", "rows": "i32",
                    "columns": "i64",
                },
                {"IN_PLACE": in_place, "ALIGNED": True, "BLOCK": SCALE_BLOCK},
                SCALE_WARPS,
            )  # fmt: skip


AHEAD_OF_TIME = list(_cases())
