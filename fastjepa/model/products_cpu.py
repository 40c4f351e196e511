"""The matrix products of a Linear layer on a CPU, each by the faster of oneDNN and MKL.

Measured with two threads of two EPYCs (benchmarks/cpu_choices.py). With AVX-512: oneDNN with the
bias, or the residual, in its epilogue wins where the weight's rows are the short side, and for the
input's gradient; with many rows it is worth a transposed copy of the weight. The weight's gradient
in float32 goes to oneDNN where the weight's rows are the short side. With AVX2 alone MKL is faster
at all of them, most at gradients. All else is the plain product, and so is everything in float64
and where oneDNN cannot work. In bfloat16 a processor without instructions for it takes six times as
long as in float32: there the product of the same numbers is one in float32, rounded at its end.

Shapes: R rows, I input width, O output width.
"""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from fastjepa_kernels.precision import as_multiplied, wide_vectors

# From this many rows on, a transposed copy of a wide weight pays for itself.
MANY_ROWS = 2048

_onednn = torch.ops.mkldnn


def _where_it_is_fast(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(product)
    def run(x: Tensor, other: Tensor, *more: Tensor) -> Tensor:
        fast = as_multiplied(x)
        if fast is x:
            return product(x, other, *more)
        # Autocast, which asked for bfloat16, would ask again.
        with torch.autocast("cpu", enabled=False):
            out = product(fast, other.float(), *(t.float() for t in more))
        return out.to(other.dtype)

    return run


def _by_onednn(x: Tensor) -> bool:
    if x.dtype == torch.float32:
        return wide_vectors() and torch.backends.mkldnn.is_available()
    return x.dtype == torch.bfloat16


def _laid_out(weight_OI: Tensor, rows: int) -> Tensor:
    wide = weight_OI.shape[0] > weight_OI.shape[1]
    return weight_OI.t().contiguous().t() if wide and rows >= MANY_ROWS else weight_OI


@_where_it_is_fast
def linear(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    """`x W^T + b`: [R, O]. All of one dtype."""
    if not _by_onednn(x_RI):
        return torch.addmm(bias_O, x_RI, weight_OI.t())
    weight = _laid_out(weight_OI, len(x_RI))
    out: Tensor = _onednn._linear_pointwise(x_RI, weight, bias_O, "none", [], "")
    return out


@_where_it_is_fast
def linear_add(x_RI: Tensor, residual_RO: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    """`residual + x W^T + b` in the residual's dtype: [R, O]; x, W and b of one dtype."""
    if residual_RO.dtype != x_RI.dtype:
        return residual_RO + linear(x_RI, weight_OI, bias_O)
    if not _by_onednn(x_RI):
        return (residual_RO + bias_O).addmm_(x_RI, weight_OI.t())
    out: Tensor = _onednn._linear_pointwise.binary(x_RI, residual_RO, weight_OI, bias_O, "add")
    return out


@_where_it_is_fast
def grad_input(dy_RO: Tensor, weight_OI: Tensor) -> Tensor:
    """Gradient of `linear` with respect to x: `dy W`, [R, I]."""
    if not _by_onednn(dy_RO):
        return dy_RO @ weight_OI
    out: Tensor = _onednn._linear_pointwise(dy_RO, weight_OI.t(), None, "none", [], "")
    return out


@_where_it_is_fast
def grad_weight(dy_RO: Tensor, x_RI: Tensor) -> Tensor:
    """Gradient of `linear` with respect to W: `dy^T x`, [O, I]."""
    narrow = dy_RO.shape[1] < x_RI.shape[1]
    if narrow and x_RI.dtype == torch.float32 and _by_onednn(x_RI):
        out: Tensor = _onednn._linear_pointwise(dy_RO.t(), x_RI.t(), None, "none", [], "")
        return out
    return dy_RO.t() @ x_RI
