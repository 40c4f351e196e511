"""What lies between a block's products, for forwards and backwards written by hand.

None of these is differentiable: they are the pieces of an autograd function (fastjepa's
model/block_gpu.py is one). On a GPU each is one kernel (kernel.py), but for the sums of few rows;
elsewhere the formula (reference.py).

Shapes: R rows, D width, F MLP width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..backend import Backend, use_triton
from ..checks import check_same_device
from ..library import watched
from ..precision import wide
from . import reference


class NormGradients(NamedTuple):
    """What `layer_norm_backward` gives. `dx_RD` is in the residual's dtype, `narrow_RD` the same
    in that of the norm's output if asked for, `normed_RD` that output again; sums are float32 at
    least."""

    dx_RD: Tensor
    narrow_RD: Tensor
    normed_RD: Tensor
    dweight_D: Tensor
    dbias_D: Tensor
    dx_sum_D: Tensor


@watched
def add_layer_norm(
    x_RD: Tensor,
    delta_RD: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor,
    *,
    eps: float,
    dtype: torch.dtype,
    shift_D: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """`s = x + delta + shift` in x's dtype and `norm(s)` in `dtype`, both [R, D]; s is x without a
    delta. shift: the bias [D] of the product that delta is.

    Statistics in float32 (float64 for float64 x). Raises ValueError for shapes or devices that do
    not fit. (docs/method.md section 2.)
    """
    _check_rows(x_RD, delta=delta_RD)
    _check_channels(x_RD, weight=weight_D, bias=bias_D, shift=shift_D)
    if not _by_kernel(backend, x_RD):
        return reference.add_layer_norm(x_RD, delta_RD, shift_D, weight_D, bias_D, eps, dtype)
    from . import kernel

    x_RD = x_RD.contiguous()
    sum_RD = None if delta_RD is None else torch.empty_like(x_RD)
    normed_RD = torch.empty_like(x_RD, dtype=dtype)
    if len(x_RD):
        delta_RD = None if delta_RD is None else delta_RD.contiguous()
        kernel.add_norm(x_RD, delta_RD, shift_D, sum_RD, normed_RD, weight_D, bias_D, eps)
    return x_RD if sum_RD is None else sum_RD, normed_RD


@watched
def add_rows(
    x_RD: Tensor, delta_RD: Tensor, shift_D: Tensor, *, backend: Backend = "auto"
) -> Tensor:
    """`x + delta + shift` [R, D] in x's dtype, rounded once. Raises ValueError for shapes or
    devices that do not fit."""
    _check_rows(x_RD, delta=delta_RD)
    _check_channels(x_RD, shift=shift_D)
    if len(x_RD) == 0 or not _by_kernel(backend, x_RD):
        return reference.add_rows(x_RD, delta_RD, shift_D)
    from . import kernel

    x_RD = x_RD.contiguous()
    sum_RD = torch.empty_like(x_RD)
    kernel.add_norm(x_RD, delta_RD.contiguous(), shift_D, sum_RD, None, None, None, 0.0)
    return sum_RD


@watched
def layer_norm_backward(
    dn_RD: Tensor,
    x_RD: Tensor,
    residual_RD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    *,
    eps: float,
    narrow: bool = True,
    backend: Backend = "auto",
) -> NormGradients:
    """Gradients of `norm(x)` for dn [R, D]; `residual` [R, D], x's gradient by other ways, is
    added to x's. Without `narrow` x's gradient is in the residual's dtype alone. Raises ValueError
    as `add_layer_norm` does."""
    _check_rows(x_RD, dn=dn_RD, residual=residual_RD)
    _check_channels(x_RD, weight=weight_D, bias=bias_D)
    if len(x_RD) == 0 or not _by_kernel(backend, x_RD):
        found = reference.layer_norm_backward(dn_RD, x_RD, residual_RD, weight_D, bias_D, eps)
        return NormGradients(*found)
    from . import kernel

    dx_RD = torch.empty_like(residual_RD, memory_format=torch.contiguous_format)
    second = narrow and dx_RD.dtype != dn_RD.dtype
    narrow_RD = torch.empty_like(dx_RD, dtype=dn_RD.dtype) if second else None
    normed_RD = torch.empty_like(dx_RD, dtype=dn_RD.dtype)
    sums = kernel.norm_backward(
        dn_RD.contiguous(), x_RD.contiguous(), residual_RD.contiguous(), weight_D, bias_D, dx_RD,
        narrow_RD, normed_RD, eps,
    )  # fmt: skip
    return NormGradients(dx_RD, dx_RD if narrow_RD is None else narrow_RD, normed_RD, *sums)


@watched
def gelu(
    h_RF: Tensor,
    shift_F: Tensor | None = None,
    *,
    overwrite: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """`gelu(h + shift)` [R, F] in h's dtype, exact to that dtype's rounding; `overwrite` writes it
    over h, which must be contiguous then. shift: the bias [F] of the product that h is. Raises
    ValueError for other shapes and strides."""
    _check_rows(h_RF)
    _check_channels(h_RF, shift=shift_F)
    if overwrite and not h_RF.is_contiguous():
        raise ValueError(f"h: expected a contiguous tensor, got strides {h_RF.stride()}")
    if len(h_RF) == 0 or not _by_kernel(backend, h_RF):
        a_RF = reference.gelu(h_RF, shift_F)
        return h_RF.copy_(a_RF) if overwrite else a_RF
    from . import kernel

    h_RF = h_RF.contiguous()
    a_RF = h_RF if overwrite else torch.empty_like(h_RF)
    kernel.gelu(h_RF, shift_F, a_RF)
    return a_RF


@watched
def gelu_backward(
    h_RF: Tensor, da_RF: Tensor, shift_F: Tensor | None = None, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """For `a = gelu(h + shift)`: h's gradient [R, F], which overwrites `da`; a again, in h's dtype;
    the gradient's sum over rows [F], float32 at least. Raises ValueError for shapes or devices
    that do not fit, and for a `da` that is not contiguous."""
    _check_rows(h_RF, da=da_RF)
    _check_channels(h_RF, shift=shift_F)
    if not da_RF.is_contiguous():
        raise ValueError(f"da: expected a contiguous tensor, got strides {da_RF.stride()}")
    if len(h_RF) == 0 or not _by_kernel(backend, h_RF):
        dh_RF, a_RF, sum_F = reference.gelu_backward(h_RF, da_RF, shift_F)
        return da_RF.copy_(dh_RF), a_RF, sum_F
    from . import kernel

    h_RF = h_RF.contiguous()
    a_RF = torch.empty_like(h_RF)
    sum_F = kernel.gelu_backward(h_RF, shift_F, da_RF, a_RF)
    return da_RF, a_RF, sum_F


@watched
def column_sums(x_RF: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Sums of x [R, F] over its rows: [F], float32 at least. Raises ValueError for other shapes."""
    _check_rows(x_RF)
    if len(x_RF) == 0 or not _by_kernel(backend, x_RF):
        return reference.column_sums(x_RF)
    from . import kernel

    return kernel.column_sums(x_RF.contiguous())


@watched
def narrowed_with_sums(
    x_RF: Tensor, dtype: torch.dtype, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """x in `dtype`, itself if it is of it, and x's sums over its rows [F], float32 at least.
    Raises ValueError for other shapes."""
    _check_rows(x_RF)
    if len(x_RF) == 0 or not _by_kernel(backend, x_RF):
        return x_RF.to(dtype), reference.column_sums(x_RF)
    from . import kernel

    x_RF = x_RF.contiguous()
    if x_RF.dtype == dtype:
        return x_RF, kernel.column_sums(x_RF)
    copy_RF = torch.empty_like(x_RF, dtype=dtype)
    return copy_RF, kernel.column_sums(x_RF, copy_RF)


@watched
def float8_rows(x_RD: Tensor, *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """x [R, D] in float8 (e4m3), each row divided by its largest size over 448, and the float32
    scales [R, 1] that lead back. Raises ValueError for other shapes."""
    _check_rows(x_RD)
    if len(x_RD) == 0 or not _by_kernel(backend, x_RD):
        return reference.float8_rows(x_RD)
    from . import kernel

    x_RD = x_RD.contiguous()
    out_RD = torch.empty_like(x_RD, dtype=torch.float8_e4m3fn)
    scale_R1 = x_RD.new_empty((len(x_RD), 1), dtype=torch.float32)
    kernel.float8_rows(x_RD, out_RD, scale_R1)
    return out_RD, scale_R1


def _by_kernel(backend: Backend, x: Tensor) -> bool:
    if wide(x.dtype) == torch.float64:  # the kernels compute in float32
        return False
    return use_triton(backend, x)


def _check_rows(x: Tensor, **beside: Tensor | None) -> None:
    if x.ndim != 2:
        raise ValueError(f"rows: expected [R, D], got {tuple(x.shape)}")
    for name, tensor in beside.items():
        if tensor is not None and tensor.shape != x.shape:
            raise ValueError(f"{name}: expected {tuple(x.shape)}, got {tuple(tensor.shape)}")
    check_same_device(rows=x, **beside)


def _check_channels(x_RD: Tensor, **beside: Tensor | None) -> None:
    for name, tensor in beside.items():
        if tensor is not None and tensor.shape != x_RD.shape[1:]:
            raise ValueError(f"{name}: expected [{x_RD.shape[1]}], got {tuple(tensor.shape)}")
    check_same_device(rows=x_RD, **beside)
