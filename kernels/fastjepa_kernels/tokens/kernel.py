"""Rows picked, put in their places and taken apart again, each row moved once.

Three kernels over tiles of BLOCK_R rows by BLOCK_D columns (384, 1024, 1408 and 1664 columns are
whole tiles), element size e, R named rows of M:

- `_gather`: `out[r] = x[row[r]] + add`. Reads and writes R D e.
- `_place`: `out[m] = sum over groups of x[inverse[g, m]]`, or `fill` where no group names m, plus
  `add`; the backward of a gather and the forward of a sequence. Reads R D e, writes M D e.
- `_take_apart`: `out[row[m]] = x[m]` where a row is named, and the sums over all rows and over
  those that none names: the backward of a sequence. Reads M D e, writes R D e.

Grid: tiles of rows by tiles of columns, those of one row next to one another.
`_invert` turns row numbers into the rows' places, 4 bytes a row and group: with it each output
row is written by one program, groups in order, so no kernel needs an atomic add.
Where sums over rows are wanted, a program walks over STEPS tiles, adds them up in registers and
leaves one row of sums; `_finish` adds those in order. Fixed tiles and orders, so two runs give the
same bits. Sums are in float32, in float64 for float64 rows. 16 elements a thread: 2 loads of 16
bytes in half precision, 4 in float32.

Shapes: M rows, R named rows, G groups, P programs, D width.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ahead_of_time import Case
from ..grid import cdiv
from ..precision import wide

BLOCK_R, BLOCK_D, STEPS, NUM_WARPS = 16, 128, 8, 4
BLOCK_INVERT, BLOCK_P, BLOCK_SUM = 1024, 64, 32


@triton.jit
def _invert(row_ptr, inverse_ptr, begin, end, BLOCK: tl.constexpr):
    place = begin + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(row_ptr + place, mask=place < end, other=0).to(tl.int64)
    tl.store(inverse_ptr + row, place, mask=place < end)


@triton.jit
def _tile(width, BLOCK_D: tl.constexpr):
    """Which rows this program takes, and which columns: neighbours share their rows."""
    columns = tl.cdiv(width, BLOCK_D)
    program, column = tl.program_id(0) // columns, tl.program_id(0) % columns
    return program.to(tl.int64), column * BLOCK_D + tl.arange(0, BLOCK_D)


@triton.jit
def _gather(
    x_ptr, row_ptr, add_ptr, out_ptr, rows, width, stride,
    ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program, d_D = _tile(width, BLOCK_D)
    r_R1 = program * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    d_1D = d_D[None, :]
    inside = (r_R1 < rows) & (d_1D < width)
    row_R1 = tl.load(row_ptr + r_R1, mask=r_R1 < rows, other=0).to(tl.int64)
    x_RD = tl.load(x_ptr + row_R1 * stride + d_1D, mask=inside, other=0.0)
    if add_ptr is not None:
        add_1D = tl.load(add_ptr + d_1D, mask=d_1D < width, other=0.0)
        x_RD = (x_RD.to(ACC) + add_1D.to(ACC)).to(x_RD.dtype)
    tl.store(out_ptr + r_R1 * width + d_1D, x_RD, mask=inside)


@triton.jit
def _place(
    x_ptr, inverse_ptr, fill_ptr, add_ptr, out_ptr, sums_ptr, rows, width, stride, groups,
    ACC: tl.constexpr, STEPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program, d_D = _tile(width, BLOCK_D)
    d_1D = d_D[None, :]
    in_1D = d_1D < width
    sum_RD = tl.zeros((BLOCK_R, BLOCK_D), ACC)
    for step in range(STEPS):
        m_R1 = (program * STEPS + step) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        inside = (m_R1 < rows) & in_1D
        y_RD = tl.zeros((BLOCK_R, BLOCK_D), ACC)
        named_R1 = tl.zeros((BLOCK_R, 1), tl.int1)
        entry_R1 = m_R1
        for _ in range(groups):
            place_R1 = tl.load(inverse_ptr + entry_R1, mask=m_R1 < rows, other=-1)
            entry_R1 += rows
            here_R1 = place_R1 >= 0
            named_R1 = named_R1 | here_R1
            x_RD = tl.load(
                x_ptr + place_R1.to(tl.int64) * stride + d_1D, mask=here_R1 & in_1D, other=0.0
            )
            y_RD += x_RD.to(ACC)
        sum_RD += y_RD
        if fill_ptr is not None:
            fill_1D = tl.load(fill_ptr + d_1D, mask=in_1D, other=0.0).to(ACC)
            y_RD = tl.where(named_R1, y_RD, fill_1D)
        if add_ptr is not None:
            y_RD += tl.load(add_ptr + d_1D, mask=in_1D, other=0.0).to(ACC)
        tl.store(out_ptr + m_R1 * width + d_1D, y_RD.to(out_ptr.dtype.element_ty), mask=inside)
    if sums_ptr is not None:
        tl.store(sums_ptr + program * width + d_D, tl.sum(sum_RD, axis=0), mask=d_D < width)


@triton.jit
def _take_apart(
    x_ptr, inverse_ptr, out_ptr, sums_ptr, rows, width, stride, programs,
    ACC: tl.constexpr, STEPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program, d_D = _tile(width, BLOCK_D)
    d_1D = d_D[None, :]
    in_1D = d_1D < width
    every_RD = tl.zeros((BLOCK_R, BLOCK_D), ACC)
    unnamed_RD = tl.zeros((BLOCK_R, BLOCK_D), ACC)
    for step in range(STEPS):
        m_R1 = (program * STEPS + step) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        place_R1 = tl.load(inverse_ptr + m_R1, mask=m_R1 < rows, other=-1)
        x_RD = tl.load(x_ptr + m_R1 * stride + d_1D, mask=(m_R1 < rows) & in_1D, other=0.0)
        tl.store(
            out_ptr + place_R1.to(tl.int64) * width + d_1D,
            x_RD.to(out_ptr.dtype.element_ty), mask=(place_R1 >= 0) & in_1D,
        )  # fmt: skip
        every_RD += x_RD.to(ACC)
        unnamed_RD += tl.where(place_R1 < 0, x_RD.to(ACC), 0.0)
    every_ptr = sums_ptr + program * width + d_D
    tl.store(every_ptr, tl.sum(every_RD, axis=0), mask=d_D < width)
    unnamed_ptr = sums_ptr + (program + programs) * width + d_D
    tl.store(unnamed_ptr, tl.sum(unnamed_RD, axis=0), mask=d_D < width)


@triton.jit
def _finish(sums_ptr, out_ptr, programs, width, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    kind = tl.program_id(1).to(tl.int64)
    d_D = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    sum_PD = tl.zeros((BLOCK_P, BLOCK_D), sums_ptr.dtype.element_ty)
    for first in range(0, programs, BLOCK_P):
        p_P1 = first + tl.arange(0, BLOCK_P)[:, None]
        sum_PD += tl.load(
            sums_ptr + (kind * programs + p_P1) * width + d_D[None, :],
            mask=(p_P1 < programs) & (d_D[None, :] < width), other=0.0,
        )  # fmt: skip
    tl.store(out_ptr + kind * width + d_D, tl.sum(sum_PD, axis=0), mask=d_D < width)


def gather_rows(x_MD: Tensor, row_R: Tensor, add_D: Tensor | None) -> Tensor:
    out_RD = x_MD.new_empty((len(row_R), x_MD.shape[1]))
    if out_RD.numel():
        _gather[(_programs(out_RD) * _columns(out_RD),)](
            x_MD, row_R, add_D, out_RD, *out_RD.shape, x_MD.stride(0),
            ACC=_accumulator(x_MD), BLOCK_R=BLOCK_R, BLOCK_D=BLOCK_D, num_warps=NUM_WARPS,
        )  # fmt: skip
    return out_RD


def place_rows(
    x_RD: Tensor,
    row_R: Tensor,
    group_sizes: Sequence[int],
    out_MD: Tensor,
    *,
    fill_D: Tensor | None = None,
    add_D: Tensor | None = None,
    sums: bool = False,
) -> Tensor:
    """Write row r of x to row `row[r]` of `out`, adding groups up. Returns the sum of x's rows
    [1, D] if it is asked for, else [0, D]."""
    steps = STEPS if sums else 1
    programs = _programs(out_MD, steps)
    partial_KPD = _partial_sums(out_MD, int(sums), programs)
    if out_MD.numel():
        _place[(programs * _columns(out_MD),)](
            x_RD, _inverse(row_R, group_sizes, len(out_MD)), fill_D, add_D, out_MD,
            partial_KPD if sums else None, *out_MD.shape, x_RD.stride(0), len(group_sizes),
            ACC=_accumulator(out_MD), STEPS=steps, BLOCK_R=BLOCK_R, BLOCK_D=BLOCK_D,
            num_warps=NUM_WARPS,
        )  # fmt: skip
    return _finished(partial_KPD)


def take_apart(x_MD: Tensor, row_R: Tensor, out_RD: Tensor) -> Tensor:
    """Write row `row[r]` of x to row r of `out`. Returns the sums of all rows and of the rows that
    are not named: [2, D]."""
    programs = _programs(x_MD, STEPS)
    partial_KPD = _partial_sums(x_MD, 2, programs)
    if x_MD.numel():
        _take_apart[(programs * _columns(x_MD),)](
            x_MD, _inverse(row_R, [len(row_R)], len(x_MD)), out_RD, partial_KPD, *x_MD.shape,
            x_MD.stride(0), programs,
            ACC=_accumulator(x_MD), STEPS=STEPS, BLOCK_R=BLOCK_R, BLOCK_D=BLOCK_D,
            num_warps=NUM_WARPS,
        )  # fmt: skip
    return _finished(partial_KPD)


def _inverse(row_R: Tensor, group_sizes: Sequence[int], num_rows: int) -> Tensor:
    """Where in `row` each group names each row, -1 where it does not: [G, M] int32."""
    inverse_GM = torch.full(
        (len(group_sizes), num_rows), -1, dtype=torch.int32, device=row_R.device
    )
    begin = 0
    for inverse_M, size in zip(inverse_GM, group_sizes, strict=True):
        if size:
            _invert[(cdiv(size, BLOCK_INVERT),)](
                row_R, inverse_M, begin, begin + size, BLOCK=BLOCK_INVERT, num_warps=NUM_WARPS
            )
        begin += size
    return inverse_GM


def _finished(partial_KPD: Tensor) -> Tensor:
    kinds, programs, width = partial_KPD.shape
    out_KD = partial_KPD.new_empty((kinds, width))
    if out_KD.numel():
        _finish[(cdiv(width, BLOCK_SUM), kinds)](
            partial_KPD, out_KD, programs, width, BLOCK_P=BLOCK_P, BLOCK_D=BLOCK_SUM,
            num_warps=NUM_WARPS,
        )  # fmt: skip
    return out_KD


def _partial_sums(x_MD: Tensor, kinds: int, programs: int) -> Tensor:
    return x_MD.new_empty((kinds, programs, x_MD.shape[1]), dtype=wide(x_MD.dtype))


def _accumulator(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _programs(x_MD: Tensor, steps: int = 1) -> int:
    return cdiv(len(x_MD), BLOCK_R * steps)


def _columns(x_MD: Tensor) -> int:
    return cdiv(x_MD.shape[1], BLOCK_D)


def _cases(name: str, kernel: Any, signature: dict[str, str], **constants: Any) -> list[Case]:
    """The kernel for rows of each dtype ("T" in the signature; "P" a parameter or a sum)."""
    cases = []
    for dtype in ("bf16", "fp16", "fp32", "fp64"):
        wide = "fp64" if dtype == "fp64" else "fp32"
        types = {k: f"*{ {'T': dtype, 'P': wide}.get(v, v) }" for k, v in signature.items()}
        numbers = [n for n in kernel.arg_names if n not in signature and n.islower()]
        given = {"ACC": tl.float64 if wide == "fp64" else tl.float32, **constants}
        cases.append(
            Case(
                f"{name} {dtype}",
                kernel,
                types | {n: "i32" for n in numbers if n not in constants},
                {k: v for k, v in given.items() if k in kernel.arg_names},
                num_warps=NUM_WARPS,
                divisible_by_16=tuple(
                    n for n in (*types, "width", "stride") if n in kernel.arg_names
                ),
            )
        )
    return cases


_TILE = {"BLOCK_R": BLOCK_R, "BLOCK_D": BLOCK_D}
_ROWS = {"x_ptr": "T", "inverse_ptr": "i32", "out_ptr": "T"}
_PLAIN = {"fill_ptr": None, "add_ptr": None}

AHEAD_OF_TIME = [
    *_cases("gather", _gather, {"x_ptr": "T", "row_ptr": "i64", "out_ptr": "T"}, add_ptr=None,
            **_TILE),
    *_cases("gather + embedding", _gather,
            {"x_ptr": "T", "row_ptr": "i64", "add_ptr": "P", "out_ptr": "T"}, **_TILE),
    *_cases("scatter", _place, _ROWS, sums_ptr=None, STEPS=1, **_PLAIN, **_TILE),
    *_cases("scatter and sum", _place, {**_ROWS, "sums_ptr": "P"}, STEPS=STEPS, **_PLAIN, **_TILE),
    *_cases("assemble", _place, {**_ROWS, "fill_ptr": "P", "add_ptr": "P", "out_ptr": "P"},
            sums_ptr=None, STEPS=1, **_TILE),
    *_cases("take apart", _take_apart, {**_ROWS, "x_ptr": "P", "sums_ptr": "P"}, STEPS=STEPS,
            **_TILE),
    *_cases("finish", _finish, {"sums_ptr": "P", "out_ptr": "P"}, BLOCK_P=BLOCK_P,
            BLOCK_D=BLOCK_SUM)[2:],
    *_cases("invert", _invert, {"row_ptr": "i64", "inverse_ptr": "i32"}, BLOCK=BLOCK_INVERT)[:1],
]  # fmt: skip
