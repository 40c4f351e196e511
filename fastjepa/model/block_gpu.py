"""A block on a GPU: what lies before attention and what lies behind it, each one autograd node
written by hand.

Written op by op, a block spends a third of a GPU's time in passes over rows. Here
- biases are added in the passes behind their products: bias, residual and norm are one pass, also
  from block to block, and in the backward the norm's gradient, the residual's, the norm's output
  and three sums over the rows are one; GELU's gradient, GELU again and the bias's gradient are one
  (fastjepa_kernels.block_passes);
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
from fastjepa.model.float8 import Float8Linear
from fastjepa_kernels.block_passes.op import (
    add_layer_norm,
    add_rows,
    gelu,
    gelu_backward,
    layer_norm_backward,
    narrowed_with_sums,
)
from fastjepa_kernels.rope3d.op import turn_rows_, turned_gradient

if TYPE_CHECKING:
    from fastjepa.model.block import Block


# A residual stream whose last addition is left to the norm behind it: x [R, D], what is to be added
# [R, D] in the products' dtype, and that product's bias [D].
Unsummed = tuple[Tensor, Tensor, Tensor]


def summed(stream: Tensor | Unsummed) -> Tensor:
    """The residual stream [R, D]."""
    if isinstance(stream, Tensor):
        return stream
    total: Tensor = _Sum.apply(*stream)  # type: ignore[no-untyped-call]
    return total


def before_attention(
    block: "Block", stream: Tensor | Unsummed, table_RC2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The stream's sum, and turned q, turned k and v of its norm, each [R, H, C], of one matrix.

    The sum goes on from here so that its gradients meet in one pass.
    """
    norm, attn = block.norm1, block.attn
    x_RD, delta_RD, shift_D = (stream, None, None) if isinstance(stream, Tensor) else stream
    if isinstance(attn.qkv, Float8Linear):
        return _frozen_before(block, x_RD, delta_RD, shift_D, table_RC2)
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _Before.apply(
        x_RD, delta_RD, shift_D, norm.weight, norm.bias, attn.qkv.weight, attn.qkv.bias, norm.eps,
        attn.heads, table_RC2,
    )  # type: ignore[no-untyped-call]  # fmt: skip
    return found


def after_attention(block: "Block", x_RD: Tensor, mixed_RD: Tensor) -> Unsummed:
    """`x += proj(mixed); x += fc2(gelu(fc1(norm(x))))`, whose last addition is left out."""
    norm, proj, mlp = block.norm2, block.attn.proj, block.mlp
    if isinstance(proj, Float8Linear):
        return _frozen_after(block, x_RD, mixed_RD)
    out: Unsummed = _After.apply(
        x_RD, mixed_RD, proj.weight, proj.bias, norm.weight, norm.bias, mlp.fc1.weight,
        mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias, norm.eps,
    )  # type: ignore[no-untyped-call]  # fmt: skip
    return out


@torch.no_grad()
def _frozen_before(
    block: "Block", x_RD: Tensor, delta_RD: Tensor | None, shift_D: Tensor | None, table_RC2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_Before` by products that give no gradient."""
    norm, attn, dtype = block.norm1, block.attn, product_dtype(x_RD)
    x_RD, n_RD = add_layer_norm(
        x_RD, delta_RD, norm.weight, norm.bias, eps=norm.eps, dtype=dtype, shift_D=shift_D
    )
    qkv_R3HC = attn.qkv(n_RD).unflatten(-1, (3, attn.heads, -1))
    q, k, v = turn_rows_(qkv_R3HC, table_RC2).unbind(1)
    return x_RD, q, k, v


@torch.no_grad()
def _frozen_after(block: "Block", x_RD: Tensor, mixed_RD: Tensor) -> Unsummed:
    """`_After` by products that give no gradient."""
    norm, proj, dtype = block.norm2, block.attn.proj, product_dtype(x_RD)
    fc1, fc2 = block.mlp.fc1, block.mlp.fc2
    assert isinstance(proj, Float8Linear)
    assert isinstance(fc1, Float8Linear)
    assert isinstance(fc2, Float8Linear)
    x_RD, n_RD = add_layer_norm(
        x_RD, proj.product(mixed_RD.to(dtype)), norm.weight, norm.bias, eps=norm.eps, dtype=dtype,
        shift_D=proj.bias,
    )  # fmt: skip
    a_RF = gelu(fc1.product(n_RD), fc1.bias, overwrite=True)
    return x_RD, fc2.product(a_RF), fc2.bias


def _for_products(dtype: torch.dtype, *parameters: Tensor) -> Sequence[Tensor]:
    """The parameters in the products' dtype: themselves, as under ZeRO, or copies."""
    if all(parameter.dtype == dtype for parameter in parameters):
        return parameters
    copies = [torch.empty_like(parameter, dtype=dtype) for parameter in parameters]
    torch._foreach_copy_(copies, parameters)
    return copies


def _grad_weight(dy_RO: Tensor, x_RI: Tensor, dtype: torch.dtype) -> Tensor:
    """`dy^T x` in the weight's dtype: [O, I]."""
    if dtype == dy_RO.dtype or dy_RO.device.type != "cuda":
        return (dy_RO.t() @ x_RI).to(dtype)
    return torch.mm(dy_RO.t(), x_RI, out_dtype=dtype)


class _Before(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, x_RD, delta_RD, shift_D, norm_w, norm_b, qkv_w, qkv_b, eps, heads, table_RC2
    ) -> Any:
        dtype = product_dtype(x_RD)
        x_RD, n_RD = add_layer_norm(
            x_RD, delta_RD, norm_w, norm_b, eps=eps, dtype=dtype, shift_D=shift_D
        )
        weight, bias = _for_products(dtype, qkv_w, qkv_b)
        qkv_R3HC = torch.addmm(bias, n_RD, weight.t()).unflatten(-1, (3, heads, -1))
        turn_rows_(qkv_R3HC, table_RC2)
        ctx.save_for_backward(x_RD, norm_w, norm_b, qkv_w, table_RC2)
        ctx.eps, ctx.shift = eps, None if shift_D is None else shift_D.dtype
        return x_RD, *qkv_R3HC.unbind(1)

    @staticmethod
    def backward(ctx: Any, dx_RD, dq_RHC, dk_RHC, dv_RHC) -> Any:  # type: ignore[no-untyped-def]
        x_RD, norm_w, norm_b, qkv_w, table_RC2 = ctx.saved_tensors
        dqkv_R3HC, dqkv_sum_3HC = turned_gradient(dq_RHC, dk_RHC, dv_RHC, table_RC2)
        dqkv = dqkv_R3HC.flatten(1)
        (weight,) = _for_products(dqkv.dtype, qkv_w)
        added = ctx.shift is not None
        norm = layer_norm_backward(
            dqkv @ weight, x_RD, dx_RD, norm_w, norm_b, eps=ctx.eps, narrow=added
        )
        dqkv_w = _grad_weight(dqkv, norm.normed_RD, qkv_w.dtype)
        dqkv_b = dqkv_sum_3HC.flatten().to(qkv_w.dtype)
        dnorm = norm.dweight_D.to(norm_w.dtype), norm.dbias_D.to(norm_b.dtype)
        dadded = (norm.narrow_RD, norm.dx_sum_D.to(ctx.shift)) if added else (None, None)
        return norm.dx_RD, *dadded, *dnorm, dqkv_w, dqkv_b, None, None, None


class _After(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, x_RD, mixed_RD, proj_w, proj_b, norm_w, norm_b, fc1_w, fc1_b, fc2_w, fc2_b, eps
    ) -> Unsummed:
        dtype = product_dtype(x_RD)
        mixed_RD = mixed_RD.to(dtype)
        proj, fc1, fc2 = _for_products(dtype, proj_w, fc1_w, fc2_w)
        x_RD, n_RD = add_layer_norm(
            x_RD, mixed_RD @ proj.t(), norm_w, norm_b, eps=eps, dtype=dtype, shift_D=proj_b
        )
        h_RF = n_RD @ fc1.t()
        del n_RD
        trains = any(ctx.needs_input_grad)
        if trains:
            ctx.save_for_backward(x_RD, mixed_RD, h_RF, proj_w, norm_w, norm_b, fc1_w, fc1_b, fc2_w)
            ctx.eps = eps
        return x_RD, gelu(h_RF, fc1_b, overwrite=not trains) @ fc2.t(), fc2_b.clone()

    @staticmethod
    def backward(ctx: Any, dx_RD, dy, dfc2_b) -> Any:  # type: ignore[no-untyped-def]
        x_RD, mixed_RD, h_RF, proj_w, norm_w, norm_b, fc1_w, fc1_b, fc2_w = ctx.saved_tensors
        own = proj_w.dtype
        proj, fc1, fc2 = _for_products(mixed_RD.dtype, proj_w, fc1_w, fc2_w)
        dh_RF, a_RF, dfc1_b = gelu_backward(h_RF, dy @ fc2, fc1_b)
        dfc2_w = _grad_weight(dy, a_RF, own)
        del h_RF, a_RF, dy
        norm = layer_norm_backward(dh_RF @ fc1, x_RD, dx_RD, norm_w, norm_b, eps=ctx.eps)
        dfc1_w = _grad_weight(dh_RF, norm.normed_RD, own)
        del dh_RF
        dnorm = norm.dweight_D.to(norm_w.dtype), norm.dbias_D.to(norm_b.dtype)
        dmixed_RD = norm.narrow_RD @ proj
        dproj_w = _grad_weight(norm.narrow_RD, mixed_RD, own)
        grads = norm.dx_RD, dmixed_RD, dproj_w, norm.dx_sum_D.to(own), *dnorm
        return *grads, dfc1_w, dfc1_b.to(own), dfc2_w, dfc2_b, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD, delta_RD, shift_D) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.dtypes = delta_RD.dtype, shift_D.dtype
        return add_rows(x_RD, delta_RD, shift_D)

    @staticmethod
    def backward(ctx: Any, dy_RD) -> Any:  # type: ignore[no-untyped-def]
        dtype, own = ctx.dtypes
        narrow_RD, sum_D = narrowed_with_sums(dy_RD, dtype)
        return dy_RD, narrow_RD, sum_D.to(own)
