"""A block on a GPU: what lies before attention and what lies behind it, each one autograd node
written by hand.

Written op by op, a block spends a third of a GPU's time in passes over rows. Here
- residual and norm are one pass, and in the backward the norm's gradient, the residual's, the
  norm's output and three sums over the rows are one; GELU's gradient, GELU again and the bias's
  gradient are one (fastjepa_kernels.block_passes);
- q and k are rotated where the product wrote them, and their gradients turned back while the three
  are packed and summed over the rows;
- LayerNorm's and GELU's outputs are made again in the backward, not saved, and so are the weights
  in the products' dtype, all of a node in one launch;
- gradients of weights come out of the products in float32.
The numbers are those of block.py to rounding. Attention lies between the two, by any backend.

Shapes: R packed rows, D width, H heads, C head channels, F MLP width.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastjepa.model.autocast import product_dtype
from fastjepa_kernels.block_passes.op import (
    add_layer_norm,
    gelu,
    gelu_backward,
    layer_norm_backward,
    narrowed_with_sums,
)
from fastjepa_kernels.rope3d.op import turn_rows_, turned_gradient

if TYPE_CHECKING:
    from fastjepa.model.block import Block


def before_attention(
    block: "Block", x_RD: Tensor, table_RC2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x itself, and turned q, turned k and v of its norm, each [R, H, C], of one matrix.

    x goes on from here so that its gradients meet in one pass.
    """
    norm, attn = block.norm1, block.attn
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _Before.apply(
        x_RD, norm.weight, norm.bias, attn.qkv.weight, attn.qkv.bias, norm.eps, attn.heads,
        table_RC2,
    )  # type: ignore[no-untyped-call]  # fmt: skip
    return found


def after_attention(block: "Block", x_RD: Tensor, mixed_RD: Tensor) -> Tensor:
    """`x += proj(mixed); x += fc2(gelu(fc1(norm(x))))`: [R, D]."""
    norm, proj, mlp = block.norm2, block.attn.proj, block.mlp
    out: Tensor = _After.apply(
        x_RD, mixed_RD, proj.weight, proj.bias, norm.weight, norm.bias, mlp.fc1.weight,
        mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias, norm.eps,
    )  # type: ignore[no-untyped-call]  # fmt: skip
    return out


def _for_products(dtype: torch.dtype, *parameters: Tensor) -> Sequence[Tensor]:
    """The parameters in the products' dtype: themselves, as under ZeRO, or copies."""
    if all(parameter.dtype == dtype for parameter in parameters):
        return parameters
    copies = [torch.empty_like(parameter, dtype=dtype) for parameter in parameters]
    torch._foreach_copy_(copies, parameters)
    return copies


def _linear(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    return torch.addmm(bias_O, x_RI, weight_OI.t())


def _grad_weight(dy_RO: Tensor, x_RI: Tensor, dtype: torch.dtype) -> Tensor:
    """`dy^T x` in the weight's dtype: [O, I]."""
    if dtype == dy_RO.dtype or dy_RO.device.type != "cuda":
        return (dy_RO.t() @ x_RI).to(dtype)
    return torch.mm(dy_RO.t(), x_RI, out_dtype=dtype)


class _Before(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD, norm_w, norm_b, qkv_w, qkv_b, eps, heads, table_RC2) -> Any:  # type: ignore[no-untyped-def]
        dtype = product_dtype(x_RD)
        _, n_RD = add_layer_norm(x_RD, None, norm_w, norm_b, eps=eps, dtype=dtype)
        qkv_R3HC = _linear(n_RD, *_for_products(dtype, qkv_w, qkv_b)).unflatten(-1, (3, heads, -1))
        turn_rows_(qkv_R3HC, table_RC2)
        ctx.save_for_backward(x_RD, norm_w, norm_b, qkv_w, table_RC2)
        ctx.eps = eps
        return x_RD, *qkv_R3HC.unbind(1)

    @staticmethod
    def backward(ctx: Any, dx_RD, dq_RHC, dk_RHC, dv_RHC) -> Any:  # type: ignore[no-untyped-def]
        x_RD, norm_w, norm_b, qkv_w, table_RC2 = ctx.saved_tensors
        dqkv_R3HC, dqkv_sum_3HC = turned_gradient(dq_RHC, dk_RHC, dv_RHC, table_RC2)
        dqkv = dqkv_R3HC.flatten(1)
        (weight,) = _for_products(dqkv.dtype, qkv_w)
        norm = layer_norm_backward(
            dqkv @ weight, x_RD, dx_RD, norm_w, norm_b, eps=ctx.eps, narrow=False
        )
        dqkv_w = _grad_weight(dqkv, norm.normed_RD, qkv_w.dtype)
        dqkv_b = dqkv_sum_3HC.flatten().to(qkv_w.dtype)
        dnorm = norm.dweight_D.to(norm_w.dtype), norm.dbias_D.to(norm_b.dtype)
        return norm.dx_RD, *dnorm, dqkv_w, dqkv_b, None, None, None


class _After(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, x_RD, mixed_RD, proj_w, proj_b, norm_w, norm_b, fc1_w, fc1_b, fc2_w, fc2_b, eps
    ) -> Tensor:
        dtype = product_dtype(x_RD)
        mixed_RD = mixed_RD.to(dtype)
        # Two of each: the weight and the bias.
        narrow = _for_products(dtype, proj_w, proj_b, fc1_w, fc1_b, fc2_w, fc2_b)
        proj, fc1, fc2 = narrow[:2], narrow[2:4], narrow[4:]
        x_RD, n_RD = add_layer_norm(
            x_RD, _linear(mixed_RD, *proj), norm_w, norm_b, eps=eps, dtype=dtype
        )
        h_RF = _linear(n_RD, *fc1)
        del n_RD
        if not any(ctx.needs_input_grad):
            own: Tensor = x_RD.add_(_linear(gelu(h_RF, overwrite=True), *fc2))
            return own
        ctx.save_for_backward(x_RD, mixed_RD, h_RF, proj_w, norm_w, norm_b, fc1_w, fc2_w)
        ctx.eps = eps
        out: Tensor = x_RD + _linear(gelu(h_RF), *fc2)
        return out

    @staticmethod
    def backward(ctx: Any, dy_RD) -> Any:  # type: ignore[no-untyped-def]
        x_RD, mixed_RD, h_RF, proj_w, norm_w, norm_b, fc1_w, fc2_w = ctx.saved_tensors
        dtype, own = mixed_RD.dtype, proj_w.dtype
        proj, fc1, fc2 = _for_products(dtype, proj_w, fc1_w, fc2_w)
        dy, dfc2_b = narrowed_with_sums(dy_RD, dtype)
        dh_RF, a_RF, dfc1_b = gelu_backward(h_RF, dy @ fc2)
        dfc2_w = _grad_weight(dy, a_RF, own)
        del h_RF, a_RF, dy
        norm = layer_norm_backward(dh_RF @ fc1, x_RD, dy_RD, norm_w, norm_b, eps=ctx.eps)
        dfc1_w = _grad_weight(dh_RF, norm.normed_RD, own)
        del dh_RF
        dnorm = norm.dweight_D.to(norm_w.dtype), norm.dbias_D.to(norm_b.dtype)
        dmixed_RD = norm.narrow_RD @ proj
        dproj_w = _grad_weight(norm.narrow_RD, mixed_RD, own)
        grads = norm.dx_RD, dmixed_RD, dproj_w, norm.dx_sum_D.to(own), *dnorm
        return *grads, dfc1_w, dfc1_b.to(own), dfc2_w, dfc2_b.to(own), None
