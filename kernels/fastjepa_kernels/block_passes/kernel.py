"""The passes between a block's products, each element read and written once.

A row of a norm is held by one program, which sums over it in registers: no statistics are kept
between forward and backward. Programs walk over many rows: what belongs to the channels, weights
and biases, they read once, and sums over the rows (gradients of biases and norms) are added up in
registers, and their parts in one more, small pass: the order is fixed, so two runs give the same
bits.

Bytes a row, with e of the products' dtype and s of the residual stream's: `add_norm` reads
`D (s + e)` and writes as much; `norm_backward` reads `D (e + 2 s)` and writes `D (2 e + s)`;
`gelu` reads and writes `F e`, `gelu_backward` `2 F e`. On an H200 an exact erf takes as long as
these bytes; where results are of half precision, one to 1.5e-7 takes its place.

Shapes: R rows, D width, F MLP width, P programs.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ahead_of_time import Case
from ..grid import cdiv, next_power_of_2

# Numbers a thread holds of each tensor.
A_THREAD = 8
COLUMNS = 256


class Walk(NamedTuple):
    """Rows of a tile, and programs that walk over the tiles. They fill the GPU, and where they sum
    over rows, their parts are small beside the rows."""

    rows: int
    programs: int

    @property
    def warps(self) -> int:
        return max(1, self.rows * COLUMNS // (32 * A_THREAD))

    def grid(self, rows: int, width: int) -> tuple[int, int]:
        """Programs over columns, and over rows."""
        across = cdiv(width, COLUMNS)
        return across, min(cdiv(rows, self.rows), max(1, self.programs // across))


GELU, GELU_BACKWARD, SUMS = Walk(8, 16896), Walk(4, 1056), Walk(8, 1056)
# Of a norm's passes: numbers of a tile, and programs.
NORM, NORM_BACKWARD = (1024, 4224), (1024, 528)


@triton.jit
def _tile(start, num_rows, d_D, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr):
    """Where the channels d of rows `start` on lie, and which of them there are."""
    row_R = (start + tl.arange(0, BLOCK_R)[:, None]).to(tl.int64)
    return row_R * WIDTH + d_D, (row_R < num_rows) & (d_D < WIDTH)


@triton.jit
def _channels(ptr, d_D, WIDTH: tl.constexpr):
    """What belongs to the channels d, the same in every row: float32."""
    return tl.load(ptr + d_D, mask=d_D < WIDTH, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows"])
def _add_norm(
    x_ptr, delta_ptr, shift_ptr, sum_ptr, out_ptr, weight_ptr, bias_ptr, num_rows, eps,
    WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    d_D = tl.arange(0, BLOCK_D)[None, :]
    if shift_ptr is not None:
        shift_D = _channels(shift_ptr, d_D, WIDTH)
    if out_ptr is not None:
        weight_D = _channels(weight_ptr, d_D, WIDTH)
        bias_D = _channels(bias_ptr, d_D, WIDTH)
    for start in range(tl.program_id(0) * BLOCK_R, num_rows, tl.num_programs(0) * BLOCK_R):
        place, inside = _tile(start, num_rows, d_D, WIDTH, BLOCK_R)
        x_RD = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if delta_ptr is not None:
            delta_RD = tl.load(delta_ptr + place, mask=inside, other=0.0).to(tl.float32)
            if shift_ptr is not None:
                delta_RD += shift_D
            rounded_RD = (x_RD + delta_RD).to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + place, rounded_RD, mask=inside)
            x_RD = rounded_RD.to(tl.float32)
        if out_ptr is not None:
            unit_RD, _ = _standard(x_RD, d_D, WIDTH, eps)
            out_RD = unit_RD * weight_D + bias_D
            tl.store(out_ptr + place, out_RD.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _standard(x_RD, d_D, WIDTH: tl.constexpr, eps):
    mean_R = tl.sum(x_RD, 1, keep_dims=True) / WIDTH
    centred_RD = tl.where(d_D < WIDTH, x_RD - mean_R, 0.0)
    inverse_R = 1.0 / tl.sqrt(tl.sum(centred_RD * centred_RD, 1, keep_dims=True) / WIDTH + eps)
    return centred_RD * inverse_R, inverse_R


@triton.jit
def _rows(
    x_ptr, dn_ptr, residual_ptr, start, num_rows, d_D, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    place, inside = _tile(start, num_rows, d_D, WIDTH, BLOCK_R)
    x_RD = tl.load(x_ptr + place, mask=inside, other=0.0)
    dn_RD = tl.load(dn_ptr + place, mask=inside, other=0.0)
    residual_RD = tl.load(residual_ptr + place, mask=inside, other=0.0)
    return x_RD, dn_RD, residual_RD


@triton.jit(do_not_specialize=["num_rows"])
def _norm_backward(
    dn_ptr, x_ptr, residual_ptr, weight_ptr, bias_ptr, dx_ptr, narrow_ptr, out_ptr, parts_ptr,
    num_rows, eps,
    WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    d_D = tl.arange(0, BLOCK_D)[None, :]
    weight_D, bias_D = _channels(weight_ptr, d_D, WIDTH), _channels(bias_ptr, d_D, WIDTH)
    dweight_RD = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    dbias_RD = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    dx_sum_RD = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    step = tl.num_programs(0) * BLOCK_R
    first = tl.program_id(0) * BLOCK_R
    next_x, next_dn, next_residual = _rows(
        x_ptr, dn_ptr, residual_ptr, first, num_rows, d_D, WIDTH, BLOCK_R
    )
    for start in range(first, num_rows, step):
        # The next rows are on their way while these are summed over.
        x_RD, dn_RD, residual_RD = next_x, next_dn, next_residual
        next_x, next_dn, next_residual = _rows(
            x_ptr, dn_ptr, residual_ptr, start + step, num_rows, d_D, WIDTH, BLOCK_R
        )
        place, inside = _tile(start, num_rows, d_D, WIDTH, BLOCK_R)
        dn_RD = dn_RD.to(tl.float32)
        unit_RD, inverse_R = _standard(x_RD.to(tl.float32), d_D, WIDTH, eps)
        out_RD = unit_RD * weight_D + bias_D
        tl.store(out_ptr + place, out_RD.to(out_ptr.dtype.element_ty), mask=inside)
        dweight_RD += dn_RD * unit_RD
        dbias_RD += dn_RD
        scaled_RD = dn_RD * weight_D
        along_R = tl.sum(scaled_RD * unit_RD, 1, keep_dims=True) / WIDTH
        mean_R = tl.sum(scaled_RD, 1, keep_dims=True) / WIDTH
        dx_RD = (scaled_RD - mean_R - unit_RD * along_R) * inverse_R + residual_RD.to(tl.float32)
        dx_RD = tl.where(inside, dx_RD, 0.0)
        tl.store(dx_ptr + place, dx_RD.to(dx_ptr.dtype.element_ty), mask=inside)
        if narrow_ptr is not None:
            tl.store(narrow_ptr + place, dx_RD.to(narrow_ptr.dtype.element_ty), mask=inside)
        dx_sum_RD += dx_RD
    part_D = parts_ptr + tl.program_id(0).to(tl.int64) * 3 * WIDTH + tl.arange(0, BLOCK_D)
    in_row = tl.arange(0, BLOCK_D) < WIDTH
    tl.store(part_D, tl.sum(dweight_RD, 0), mask=in_row)
    tl.store(part_D + WIDTH, tl.sum(dbias_RD, 0), mask=in_row)
    tl.store(part_D + 2 * WIDTH, tl.sum(dx_sum_RD, 0), mask=in_row)


@triton.jit
def _below(h, EXACT: tl.constexpr):
    """The normal distribution's mass below h, and its density there."""
    bell = tl.exp2(h * h * -0.7213475204444817)
    if EXACT:
        mass = 0.5 + 0.5 * tl.erf(h * 0.7071067811865476)
    else:
        # Abramowitz and Stegun 7.1.26, whose argument is h / sqrt(2).
        t = 1.0 / (1.0 + 0.2316418882083193 * tl.abs(h))
        tail = ((1.061405429 * t - 1.453152027) * t + 1.421413741) * t
        tail = 0.5 * ((tail - 0.284496736) * t + 0.254829592) * t * bell
        mass = tl.where(h < 0.0, tail, 1.0 - tail)
    return mass, 0.3989422804014327 * bell


@triton.jit(do_not_specialize=["num_rows"])
def _gelu(
    h_ptr, shift_ptr, a_ptr, num_rows,
    WIDTH: tl.constexpr, EXACT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    f_F = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    if shift_ptr is not None:
        shift_F = _channels(shift_ptr, f_F, WIDTH)
    for start in range(tl.program_id(1) * BLOCK_R, num_rows, tl.num_programs(1) * BLOCK_R):
        place, inside = _tile(start, num_rows, f_F, WIDTH, BLOCK_R)
        h_RF = tl.load(h_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if shift_ptr is not None:
            h_RF += shift_F
        mass_RF, _ = _below(h_RF, EXACT)
        tl.store(a_ptr + place, (h_RF * mass_RF).to(a_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _gelu_backward(
    h_ptr, shift_ptr, da_ptr, a_ptr, parts_ptr, num_rows,
    WIDTH: tl.constexpr, EXACT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    f_F = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    if shift_ptr is not None:
        shift_F = _channels(shift_ptr, f_F[None, :], WIDTH)
    sum_RF = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    step = tl.num_programs(1) * BLOCK_R
    for start in range(tl.program_id(1) * BLOCK_R, num_rows, step):
        place, inside = _tile(start, num_rows, f_F[None, :], WIDTH, BLOCK_R)
        h_RF = tl.load(h_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if shift_ptr is not None:
            h_RF += shift_F
        da_RF = tl.load(da_ptr + place, mask=inside, other=0.0).to(tl.float32)
        mass_RF, density_RF = _below(h_RF, EXACT)
        dh_RF = da_RF * (mass_RF + h_RF * density_RF)
        tl.store(a_ptr + place, (h_RF * mass_RF).to(a_ptr.dtype.element_ty), mask=inside)
        tl.store(da_ptr + place, dh_RF.to(da_ptr.dtype.element_ty), mask=inside)
        sum_RF += dh_RF
    part_F = parts_ptr + tl.program_id(1).to(tl.int64) * WIDTH + f_F
    tl.store(part_F, tl.sum(sum_RF, 0), mask=f_F < WIDTH)


@triton.jit(do_not_specialize=["num_rows"])
def _column_sums(
    x_ptr, copy_ptr, parts_ptr, num_rows,
    WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    f_F = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    sum_RF = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    step = tl.num_programs(1) * BLOCK_R
    for start in range(tl.program_id(1) * BLOCK_R, num_rows, step):
        place, inside = _tile(start, num_rows, f_F[None, :], WIDTH, BLOCK_R)
        x_RF = tl.load(x_ptr + place, mask=inside, other=0.0)
        if copy_ptr is not None:
            tl.store(copy_ptr + place, x_RF.to(copy_ptr.dtype.element_ty), mask=inside)
        sum_RF += x_RF.to(tl.float32)
    part_F = parts_ptr + tl.program_id(1).to(tl.int64) * WIDTH + f_F
    tl.store(part_F, tl.sum(sum_RF, 0), mask=f_F < WIDTH)


@triton.jit(do_not_specialize=["num_rows"])
def _float8_rows(
    x_ptr, out_ptr, scale_ptr, num_rows,
    WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    d_D = tl.arange(0, BLOCK_D)[None, :]
    for start in range(tl.program_id(0) * BLOCK_R, num_rows, tl.num_programs(0) * BLOCK_R):
        place, inside = _tile(start, num_rows, d_D, WIDTH, BLOCK_R)
        x_RD = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        largest_R = tl.maximum(tl.max(tl.abs(x_RD), 1, keep_dims=True), 1e-12)
        scale_R = tl.div_rn(largest_R, 448.0)
        out_RD = x_RD * tl.div_rn(1.0, scale_R)
        tl.store(out_ptr + place, out_RD.to(out_ptr.dtype.element_ty), mask=inside)
        row_R = start + tl.arange(0, BLOCK_R)[:, None]
        tl.store(scale_ptr + row_R, scale_R, mask=row_R < num_rows)


def _row_shape(width: int, numbers: int) -> dict[str, int]:
    """Rows and channels of a program's tile of at least so many numbers, and its warps."""
    block_d = next_power_of_2(width)
    block_r = max(1, numbers // block_d)
    warps = min(16, max(1, block_r * block_d // (32 * A_THREAD)))
    return {"BLOCK_R": block_r, "BLOCK_D": block_d, "num_warps": warps}


def add_norm(
    x_RD: Tensor, delta_RD: Tensor | None, shift_D: Tensor | None, sum_RD: Tensor | None,
    out_RD: Tensor | None, weight_D: Tensor | None, bias_D: Tensor | None, eps: float,
) -> None:  # fmt: skip
    """Write `x + delta + shift`, unless there is no delta, and its norm, if there is an `out`."""
    rows, width = x_RD.shape
    shape = _row_shape(width, NORM[0])
    programs = min(NORM[1], cdiv(rows, shape["BLOCK_R"]))
    _add_norm[(programs,)](
        x_RD, delta_RD, shift_D, sum_RD, out_RD, weight_D, bias_D, rows, eps, WIDTH=width, **shape
    )


def norm_backward(
    dn_RD: Tensor, x_RD: Tensor, residual_RD: Tensor, weight_D: Tensor, bias_D: Tensor,
    dx_RD: Tensor, narrow_RD: Tensor | None, out_RD: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """Write x's gradient, in a second dtype too if asked for, and the norm's output; return the
    sums over rows [3, D]: gradients of weight and bias, and of x's gradient itself."""
    rows, width = x_RD.shape
    shape = _row_shape(width, NORM_BACKWARD[0])
    programs = min(NORM_BACKWARD[1], cdiv(rows, shape["BLOCK_R"]))
    parts = x_RD.new_empty((programs, 3, width), dtype=torch.float32)
    _norm_backward[(programs,)](
        dn_RD, x_RD, residual_RD, weight_D, bias_D, dx_RD, narrow_RD, out_RD, parts, rows, eps,
        WIDTH=width, **shape,
    )  # fmt: skip
    return parts.sum(0)


def gelu(h_RF: Tensor, shift_F: Tensor | None, a_RF: Tensor) -> None:
    """Write gelu(h + shift) to `a`, which may be h."""
    rows, width = h_RF.shape
    _gelu[GELU.grid(rows, width)](
        h_RF, shift_F, a_RF, rows, WIDTH=width, EXACT=_exact(h_RF), BLOCK_R=GELU.rows,
        BLOCK_F=COLUMNS, num_warps=GELU.warps,
    )  # fmt: skip


def _exact(h: Tensor) -> bool:
    return h.dtype == torch.float32


def gelu_backward(h_RF: Tensor, shift_F: Tensor | None, da_RF: Tensor, a_RF: Tensor) -> Tensor:
    """Write gelu(h + shift) to `a` and h's gradient over `da`; return the gradient's sums [F]."""
    rows, width = h_RF.shape
    grid = GELU_BACKWARD.grid(rows, width)
    parts = h_RF.new_empty((grid[1], width), dtype=torch.float32)
    _gelu_backward[grid](
        h_RF, shift_F, da_RF, a_RF, parts, rows, WIDTH=width, EXACT=_exact(h_RF),
        BLOCK_R=GELU_BACKWARD.rows, BLOCK_F=COLUMNS, num_warps=GELU_BACKWARD.warps,
    )  # fmt: skip
    return parts.sum(0)


def column_sums(x_RF: Tensor, copy_RF: Tensor | None = None) -> Tensor:
    """Sums over the rows [F] in float32; write x to `copy` on the way."""
    rows, width = x_RF.shape
    grid = SUMS.grid(rows, width)
    parts = x_RF.new_empty((grid[1], width), dtype=torch.float32)
    _column_sums[grid](
        x_RF, copy_RF, parts, rows, WIDTH=width, BLOCK_R=SUMS.rows, BLOCK_F=COLUMNS,
        num_warps=SUMS.warps,
    )  # fmt: skip
    return parts.sum(0)


def float8_rows(x_RD: Tensor, out_RD: Tensor, scale_R1: Tensor) -> None:
    """Write x's rows in float8 and their scales."""
    rows, width = x_RD.shape
    shape = _row_shape(width, NORM[0])
    programs = min(NORM[1], cdiv(rows, shape["BLOCK_R"]))
    _float8_rows[(programs,)](x_RD, out_RD, scale_R1, rows, WIDTH=width, **shape)


def _cases() -> Iterator[Case]:
    # ViT-L, ViT-g, ViT-G and the predictor; the residual stream is float32 in the predictor.
    for name, width, stream in (
        ("ViT-L", 1024, "bf16"), ("ViT-g", 1408, "bf16"), ("ViT-G", 1664, "bf16"),
        ("predictor", 384, "fp32"),
    ):  # fmt: skip
        shape, back = _row_shape(width, NORM[0]), _row_shape(width, NORM_BACKWARD[0])
        warps, back_warps = shape.pop("num_warps"), back.pop("num_warps")
        constants = {"WIDTH": width, **shape}
        rows = {"num_rows": "i32", "eps": "fp32", "weight_ptr": "*fp32", "bias_ptr": "*fp32"}
        pointers = {"x_ptr": f"*{stream}", "out_ptr": "*bf16"}
        alone = {"delta_ptr": None, "shift_ptr": None, "sum_ptr": None}
        added = {"delta_ptr": "*bf16", "shift_ptr": "*fp32", "sum_ptr": f"*{stream}"}
        yield Case(f"add norm {name}", _add_norm, {**pointers, **rows, **added}, constants, warps)
        no_norm = dict.fromkeys(("out_ptr", "weight_ptr", "bias_ptr"))
        only = {"x_ptr": f"*{stream}", **added, "num_rows": "i32", "eps": "fp32"}
        yield Case(f"add {name}", _add_norm, only, {**constants, **no_norm}, warps)
        yield Case(f"norm {name}", _add_norm, {**pointers, **rows}, {**constants, **alone}, warps)
        yield Case(
            f"norm backward {name}", _norm_backward,
            {
                **pointers, **rows, "dn_ptr": "*bf16", "residual_ptr": f"*{stream}",
                "dx_ptr": f"*{stream}", "parts_ptr": "*fp32",
                **({"narrow_ptr": "*bf16"} if stream == "fp32" else {}),
            },
            {"WIDTH": width, **back} | ({} if stream == "fp32" else {"narrow_ptr": None}),
            back_warps,
        )  # fmt: skip
        if name not in ("ViT-L", "predictor"):
            continue
        tile = {"WIDTH": 4 * width, "BLOCK_F": COLUMNS}
        wide = {"h_ptr": "*bf16", "da_ptr": "*bf16", "a_ptr": "*bf16", "parts_ptr": "*fp32"}
        yield Case(
            f"GELU backward {name}", _gelu_backward,
            {**wide, "shift_ptr": "*fp32", "num_rows": "i32"},
            {**tile, "EXACT": False, "BLOCK_R": GELU_BACKWARD.rows}, GELU_BACKWARD.warps,
        )  # fmt: skip
        sums = {"x_ptr": "*bf16", "parts_ptr": "*fp32", "num_rows": "i32"}
        no_copy = {**tile, "copy_ptr": None, "BLOCK_R": SUMS.rows}
        yield Case(f"column sums {name}", _column_sums, sums, no_copy, SUMS.warps)
    copied = {"x_ptr": "*fp32", "copy_ptr": "*bf16", "parts_ptr": "*fp32", "num_rows": "i32"}
    tile = {"WIDTH": 384, "BLOCK_R": SUMS.rows, "BLOCK_F": COLUMNS}
    yield Case("column sums and a copy", _column_sums, copied, tile, SUMS.warps)

    for width, dtype in ((1024, "bf16"), (4096, "bf16"), (4096, "fp32")):
        shape = _row_shape(width, NORM[0])
        warps = shape.pop("num_warps")
        pointers = {"x_ptr": f"*{dtype}", "out_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}
        yield Case(
            f"rows in float8 {width} {dtype}", _float8_rows, {**pointers, "num_rows": "i32"},
            {"WIDTH": width, **shape}, warps, capabilities=(89, 999),
        )  # fmt: skip
    for dtype in ("bf16", "fp16", "fp32"):
        yield Case(
            f"GELU {dtype}", _gelu,
            {
                "h_ptr": f"*{dtype}", "shift_ptr": "*fp32", "a_ptr": f"*{dtype}", "num_rows": "i32",
            },
            {
                "WIDTH": 4096, "EXACT": dtype == "fp32", "BLOCK_R": GELU.rows, "BLOCK_F": COLUMNS,
            },
            GELU.warps,
        )  # fmt: skip


AHEAD_OF_TIME = list(_cases())
