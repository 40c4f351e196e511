"""What lies between a block's products, and its gradients, in plain PyTorch.

Shapes: R rows, D width, F MLP width.
"""

import torch
from torch import Tensor

from ..precision import wide


def add_rows(x_RD: Tensor, delta_RD: Tensor, shift_D: Tensor | None) -> Tensor:
    """`x + delta + shift` in x's dtype, rounded once."""
    delta = delta_RD.to(wide(x_RD.dtype))
    return (x_RD + (delta if shift_D is None else delta + shift_D)).to(x_RD.dtype)


def add_layer_norm(
    x_RD: Tensor, delta_RD: Tensor | None, shift_D: Tensor | None, weight_D: Tensor,
    bias_D: Tensor, eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`s = x + delta + shift` in x's dtype, and LayerNorm of s in `dtype`."""
    sum_RD = x_RD if delta_RD is None else add_rows(x_RD, delta_RD, shift_D)
    centred_RD, inverse_R1 = _standard(sum_RD, eps)
    normed_RD = centred_RD * inverse_R1 * weight_D.to(inverse_R1.dtype) + bias_D
    return sum_RD, normed_RD.to(dtype)


def layer_norm_backward(
    dn_RD: Tensor, x_RD: Tensor, residual_RD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradient of x [R, D] with `residual` added, once in residual's dtype and once in dn's; the
    norm's output again, in dn's dtype; gradients of weight and bias [D]; the sum of x's [D]."""
    centred_RD, inverse_R1 = _standard(x_RD, eps)
    unit_RD = centred_RD * inverse_R1
    dn = dn_RD.to(unit_RD.dtype)
    scaled_RD = dn * weight_D.to(unit_RD.dtype)
    along_R1 = (scaled_RD * unit_RD).mean(-1, keepdim=True)
    dx_RD = (scaled_RD - scaled_RD.mean(-1, keepdim=True) - unit_RD * along_R1) * inverse_R1
    dx_RD = dx_RD + residual_RD
    normed_RD = unit_RD * weight_D.to(unit_RD.dtype) + bias_D
    sums = (dn * unit_RD).sum(0), dn.sum(0), dx_RD.sum(0)
    return dx_RD.to(residual_RD.dtype), dx_RD.to(dn_RD.dtype), normed_RD.to(dn_RD.dtype), *sums


def gelu(h_RF: Tensor, shift_F: Tensor | None) -> Tensor:
    """`h + shift` times the normal distribution's mass below it, in h's dtype."""
    h = _shifted(h_RF, shift_F)
    return (h * 0.5 * (1 + torch.erf(h * 0.5**0.5))).to(h_RF.dtype)


def gelu_backward(
    h_RF: Tensor, da_RF: Tensor, shift_F: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of h where `a = gelu(h + shift)`, exact; a once more; and the sum of the gradient
    [F]."""
    h, da = _shifted(h_RF, shift_F), da_RF.to(wide(h_RF.dtype))
    below = 0.5 * (1 + torch.erf(h * 0.5**0.5))
    dh_RF = da * (below + h * torch.exp(-0.5 * h * h) * (2 * torch.pi) ** -0.5)
    return dh_RF.to(da_RF.dtype), (h * below).to(h_RF.dtype), dh_RF.sum(0)


def _shifted(h_RF: Tensor, shift_F: Tensor | None) -> Tensor:
    h = h_RF.to(wide(h_RF.dtype))
    return h if shift_F is None else h + shift_F


def float8_rows(x_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Rows divided by their largest size over 448, in float8 (e4m3), and these scales [R, 1]."""
    largest_R1 = x_RD.abs().amax(-1, keepdim=True).float().clamp_min(1e-12)
    scale_R1 = largest_R1 / 448.0
    return (x_RD.float() * scale_R1.reciprocal()).to(torch.float8_e4m3fn), scale_R1


def column_sums(x_RF: Tensor) -> Tensor:
    """Sums over the rows, [F], in float32 at least."""
    return x_RF.sum(0, dtype=wide(x_RF.dtype))


def _standard(x_RD: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x less its row's mean, and one over the row's deviation [R, 1]; float32 at least."""
    x = x_RD.to(wide(x_RD.dtype))
    centred_RD = x - x.mean(-1, keepdim=True)
    return centred_RD, (centred_RD.square().mean(-1, keepdim=True) + eps).rsqrt()
