"""What lies between a block's products on a CPU: our own kernels where the processor has AVX-512,
elsewhere PyTorch's.

Ours read and write every row once where PyTorch's take two to five passes, and their GELU costs
little more than a copy (benchmarks/cpu_choices.py).

Shapes: R rows, D width, F MLP width.
"""

import torch
from torch import Tensor

from fastjepa_kernels.block_passes import avx512
from fastjepa_kernels.precision import wide

CPU = torch.device("cpu")

_aten = torch.ops.aten


def _ours(*dtypes: torch.dtype) -> bool:
    # What compiles sees PyTorch's operations alone.
    return not torch.compiler.is_compiling() and avx512.refusal(CPU, *dtypes) is None


def widened(parameter: Tensor, x: Tensor) -> Tensor:
    """A norm's parameter in x's dtype where that holds more; LayerNorm takes none narrower."""
    return parameter.to(torch.promote_types(parameter.dtype, x.dtype))


def gelu(h_RF: Tensor, *, overwrite: bool = False) -> Tensor:
    """Exact GELU [R, F] in h's dtype; `overwrite` writes it over h, a contiguous tensor."""
    if _ours(h_RF.dtype):
        return avx512.gelu(h_RF, overwrite=overwrite)
    a_RF: Tensor = _aten.gelu_(h_RF) if overwrite else _aten.gelu(h_RF)
    return a_RF


def gelu_backward(
    h_RF: Tensor, da_RF: Tensor, *, overwrite: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """For `a = gelu(h)`: h's gradient [R, F], which overwrites `da`, a contiguous tensor of h's
    dtype; a again, over h with `overwrite`; the gradient's sum over rows [F], in that dtype or a
    wider one."""
    if _ours(h_RF.dtype):
        return avx512.gelu_backward(h_RF, da_RF, overwrite=overwrite)
    _aten.gelu_backward.grad_input(da_RF, h_RF, grad_input=da_RF)
    return da_RF, gelu(h_RF, overwrite=overwrite), da_RF.sum(0)


def layer_norm(
    x_RD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """LayerNorm of x [R, D], its output in `dtype`."""
    if _ours(x_RD.dtype, dtype):
        return avx512.layer_norm(x_RD, weight_D, bias_D, eps, dtype)
    return _aten_norm(x_RD, weight_D, bias_D, eps)[0].to(dtype)


def layer_norm_backward(
    dn_RD: Tensor, x_RD: Tensor, residual_RD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """For `n = layer_norm(x)`: x's gradient, `residual` added, in their dtype; n again, in dn's;
    the gradients of weight and bias [D] in theirs; the residual's sum over rows [D], in its
    dtype or a wider one."""
    if _ours(x_RD.dtype, dn_RD.dtype):
        dx_RD, n_RD, dweight, dbias, sum_D = avx512.layer_norm_backward(
            dn_RD, x_RD, residual_RD, weight_D, bias_D, eps
        )
    else:
        n_RD, mean, rstd = _aten_norm(x_RD, weight_D, bias_D, eps)
        dx_RD, dweight, dbias = _aten.native_layer_norm_backward(
            dn_RD.to(x_RD.dtype), x_RD, x_RD.shape[-1:], mean, rstd, widened(weight_D, x_RD),
            widened(bias_D, x_RD), [True, True, True],
        )  # fmt: skip
        dx_RD += residual_RD
        sum_D = residual_RD.sum(0, dtype=wide(residual_RD.dtype))
    dweight, dbias = dweight.to(weight_D.dtype), dbias.to(bias_D.dtype)
    return dx_RD, n_RD.to(dn_RD.dtype), dweight, dbias, sum_D


def _aten_norm(
    x_RD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm in x's dtype, with mean and 1/std."""
    weight, bias = widened(weight_D, x_RD), widened(bias_D, x_RD)
    n_RD, mean, rstd = _aten.native_layer_norm(x_RD, x_RD.shape[-1:], weight, bias, eps)
    return n_RD, mean, rstd
