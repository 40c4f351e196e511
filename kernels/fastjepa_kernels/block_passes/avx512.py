"""What lies between a block's products on a CPU with AVX-512, in C++ (avx512.cpp).

Rows are float32, or bfloat16 where the processor rounds to it (AVX-512 BF16), of any width; all is
computed in float32, and sums over rows in an order that no number of threads changes. As exact as
PyTorch's: GELU to 1.1e-7 of its input.

Shapes: R rows, D width, F MLP width.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from ..avx512 import IN_A_WORD, Avx512

_KIND, _AT, _EPS = ctypes.c_int, ctypes.c_void_p, ctypes.c_float
_SIZES = [ctypes.c_int64] * 2
_cpp = Avx512(
    Path(__file__).with_suffix(".cpp"),
    {
        "gelu": [_KIND, _AT, _AT, *_SIZES],
        "gelu_backward": [_KIND, *[_AT] * 4, *_SIZES],
        "norm": [_KIND, _KIND, _AT, _AT, _AT, _EPS, _AT, *_SIZES],
        "norm_backward": [_KIND, _KIND, *[_AT] * 5, _EPS, *[_AT] * 3, *_SIZES],
    },
)


def refusal(device: torch.device, *dtypes: torch.dtype) -> str | None:
    """Why it cannot take rows of these dtypes there; None if it can. The first call that gets so
    far compiles, which takes seconds once on a machine."""
    return _cpp.refusal(device, *dtypes)


def gelu(h_RF: Tensor, *, overwrite: bool = False) -> Tensor:
    """`gelu(h)` [R, F] in h's dtype, contiguous; `overwrite` writes it over h, which is so then."""
    assert not overwrite or h_RF.is_contiguous()
    h = h_RF.contiguous()
    a_RF = h if overwrite else torch.empty_like(h)
    _cpp.run("gelu", IN_A_WORD[h.dtype], h.data_ptr(), a_RF.data_ptr(), *h.shape)
    return a_RF


def gelu_backward(
    h_RF: Tensor, da_RF: Tensor, *, overwrite: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """For `a = gelu(h)`: h's gradient [R, F], which overwrites `da`; a again; the gradient's sum
    over rows [F] in float32. Both are of one dtype, `da` is contiguous; `overwrite` writes a over
    h, which is so then."""
    assert da_RF.is_contiguous()
    assert da_RF.dtype == h_RF.dtype
    assert not overwrite or h_RF.is_contiguous()
    h = h_RF.contiguous()
    a_RF = h if overwrite else torch.empty_like(h)
    sum_F = torch.empty(h.shape[1])
    _cpp.run(
        "gelu_backward", IN_A_WORD[h.dtype], h.data_ptr(), a_RF.data_ptr(), da_RF.data_ptr(),
        sum_F.data_ptr(), *h.shape,
    )  # fmt: skip
    return da_RF, a_RF, sum_F


def layer_norm(
    x_RD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """LayerNorm of x [R, D] in `dtype`, contiguous."""
    x, weight, bias = x_RD.contiguous(), weight_D.float(), bias_D.float()
    n_RD = torch.empty_like(x, dtype=dtype)
    _cpp.run(
        "norm", IN_A_WORD[x.dtype], IN_A_WORD[dtype], x.data_ptr(), weight.data_ptr(),
        bias.data_ptr(), eps, n_RD.data_ptr(), *x.shape,
    )  # fmt: skip
    return n_RD


def layer_norm_backward(
    dn_RD: Tensor, x_RD: Tensor, residual_RD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """For `n = norm(x)`: x's gradient with `residual`, which is of x's dtype, added; n again, in
    dn's dtype; the gradients of weight and bias and the residual's sum over rows [D], in
    float32."""
    assert residual_RD.dtype == x_RD.dtype
    dn, x, residual = (t.contiguous() for t in (dn_RD, x_RD, residual_RD))
    weight, bias = weight_D.float(), bias_D.float()
    dx_RD, n_RD = torch.empty_like(x), torch.empty_like(dn)
    dweight, dbias, sum_D = sum_3D = torch.empty(3, x.shape[1])
    _cpp.run(
        "norm_backward", IN_A_WORD[x.dtype], IN_A_WORD[dn.dtype], dn.data_ptr(), x.data_ptr(),
        residual.data_ptr(), weight.data_ptr(), bias.data_ptr(), eps, dx_RD.data_ptr(),
        n_RD.data_ptr(), sum_3D.data_ptr(), *x.shape,
    )  # fmt: skip
    return dx_RD, n_RD, dweight, dbias, sum_D
