"""The two halves of a block on a CPU, each one autograd node written by hand.

On a CPU a block spends much of its time around the products: allocating, copying and adding. Here
- the residual and the bias ride in a product's epilogue, and products go where they run fastest;
- attention takes q, k and v as the product gives them, and gives their gradients as the products
  take them (attention_cpu.py);
- LayerNorm's and GELU's outputs are recomputed in the backward, not saved: 10 widths a token are
  kept instead of 20. With `recompute` queries, keys, values and the MLP's hidden layer are made
  again, too, each by its product: 3 widths are kept, the halves' inputs and attention's output.

The numbers are those of block.py to rounding. Under CPU autocast the products run in bfloat16 on
the residual stream's own dtype, with float32 gradients of the weights.

Shapes: R packed rows, D width, B sequences, K tokens of one, H heads, C head channels, F MLP width.
"""

from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastjepa.model import attention_cpu
from fastjepa.model.autocast import product_dtype
from fastjepa.model.passes_cpu import (
    gelu,
    gelu_backward,
    layer_norm,
    layer_norm_backward,
)
from fastjepa.model.products_cpu import (
    grad_input,
    grad_weight,
    linear,
    linear_add,
)
from fastjepa.model.segments import Segment, SharedRow
from fastjepa_kernels.saved import needed_again

if TYPE_CHECKING:
    from fastjepa.model.block import Attention, Mlp


def attention_half(
    x_RD: Tensor,
    norm: nn.LayerNorm,
    attn: "Attention",
    tables: Sequence[Tensor],
    segments: Sequence[Segment],
    shared: SharedRow | None,
    *,
    backend: str = "auto",
    recompute: bool = False,
) -> Tensor:
    """`x + proj(attention(rope(qkv(norm(x)))))`: [R, D] -> [R, D].

    With `shared`, x [U, D] holds the row that its sequences share once, and so it is normed and
    multiplied once. `backend`: of attention_cpu.py.
    """
    out: Tensor = _AttentionHalf.apply(
        x_RD, norm.weight, norm.bias, attn.qkv.weight, attn.qkv.bias, attn.proj.weight,
        attn.proj.bias, norm.eps, attn.heads, tuple(tables), tuple(segments), shared, backend,
        recompute,
    )  # type: ignore[no-untyped-call]  # fmt: skip
    return out


def mlp_half(x_RD: Tensor, norm: nn.LayerNorm, mlp: "Mlp", *, recompute: bool = False) -> Tensor:
    """`x + fc2(gelu(fc1(norm(x))))`: [R, D] -> [R, D]."""
    out: Tensor = _MlpHalf.apply(
        x_RD, norm.weight, norm.bias, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias,
        norm.eps, recompute,
    )  # type: ignore[no-untyped-call]  # fmt: skip
    return out


def _packed(
    n_RD: Tensor, weight: Tensor, bias: Tensor, heads: int, shared: SharedRow | None
) -> Tensor:
    """q, k and v of every row of every sequence, from normed rows: [R, 3, H, C]."""
    dtype = n_RD.dtype
    qkv = linear(n_RD, weight.to(dtype), bias.to(dtype)).unflatten(-1, (3, heads, -1))
    return shared.spread(qkv) if shared else qkv


class _AttentionHalf(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        x_RD,
        norm_w,
        norm_b,
        qkv_w,
        qkv_b,
        proj_w,
        proj_b,
        eps,
        heads,
        tables,
        segments,
        shared,
        backend,
        recompute,
    ) -> Tensor:
        dtype = product_dtype(x_RD)
        n_RD = layer_norm(x_RD, norm_w, norm_b, eps, dtype)
        qkv_R3HC = _packed(n_RD, qkv_w, qkv_b, heads, shared)
        del n_RD
        mixed_RHC = qkv_R3HC.new_empty(len(qkv_R3HC), *qkv_R3HC.shape[2:])
        lses = [
            attention_cpu.rotary_forward(own.rows(qkv_R3HC), table, own.rows(mixed_RHC), backend)
            for own, table in zip(segments, tables, strict=True)
        ]
        mixed_RD = mixed_RHC.flatten(1)
        kept = () if recompute else (qkv_R3HC,)
        ctx.save_for_backward(
            x_RD, norm_w, norm_b, qkv_w, qkv_b, proj_w, mixed_RD, *tables, *lses, *kept
        )
        ctx.heads, ctx.segments, ctx.shared, ctx.eps = heads, segments, shared, eps
        ctx.backend = backend
        residual_RD = shared.spread(x_RD) if shared else x_RD
        return linear_add(mixed_RD, residual_RD, proj_w.to(dtype), proj_b.to(dtype))

    @staticmethod
    def backward(ctx, dy_RD):  # type: ignore[no-untyped-def]
        x_RD, norm_w, norm_b, qkv_w, qkv_b, proj_w, mixed_RD, *rest = ctx.saved_tensors
        count = len(ctx.segments)
        tables, lses, kept = rest[:count], rest[count : 2 * count], rest[2 * count :]
        dtype, heads, eps = mixed_RD.dtype, ctx.heads, ctx.eps
        dy = dy_RD.to(dtype)
        if kept:
            (qkv_R3HC,) = kept
        else:
            n_RD = layer_norm(x_RD, norm_w, norm_b, eps, dtype)
            qkv_R3HC = _packed(n_RD, qkv_w, qkv_b, heads, ctx.shared)
        dmixed_RHC = grad_input(dy, proj_w.to(dtype)).unflatten(-1, (heads, -1))
        mixed_RHC = mixed_RD.unflatten(-1, (heads, -1))
        dqkv_R3HC = torch.empty_like(qkv_R3HC)
        sums = [
            attention_cpu.rotary_backward(
                own.rows(dmixed_RHC), own.rows(qkv_R3HC), table, own.rows(mixed_RHC), lse,
                own.rows(dqkv_R3HC), ctx.backend,
            )
            for own, table, lse in zip(ctx.segments, tables, lses, strict=True)
        ]  # fmt: skip
        dproj_w = grad_weight(dy, mixed_RD).to(proj_w.dtype)
        dqkv_b = reduce(torch.add, sums).flatten().to(qkv_w.dtype)
        del dmixed_RHC, qkv_R3HC, kept
        dqkv = dqkv_R3HC.flatten(1)
        if ctx.shared:
            dqkv, dy_RD = ctx.shared.collect(dqkv), ctx.shared.collect(dy_RD)
        dx_RD, n_RD, dnorm_w, dnorm_b, dproj_b = layer_norm_backward(
            grad_input(dqkv, qkv_w.to(dtype)), x_RD, dy_RD, norm_w, norm_b, eps
        )
        dqkv_w = grad_weight(dqkv, n_RD).to(qkv_w.dtype)
        dproj_b = dproj_b.to(proj_w.dtype)
        return dx_RD, dnorm_w, dnorm_b, dqkv_w, dqkv_b, dproj_w, dproj_b, *(None,) * 7


class _MlpHalf(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RD, norm_w, norm_b, fc1_w, fc1_b, fc2_w, fc2_b, eps, recompute) -> Tensor:  # type: ignore[no-untyped-def]
        dtype = product_dtype(x_RD)
        n_RD = layer_norm(x_RD, norm_w, norm_b, eps, dtype)
        h_RF = linear(n_RD, fc1_w.to(dtype), fc1_b.to(dtype))
        kept = (h_RF,) if any(ctx.needs_input_grad) and not recompute else ()
        ctx.save_for_backward(x_RD, norm_w, norm_b, fc1_w, fc1_b, fc2_w, *kept)
        ctx.eps, ctx.dtype = eps, dtype
        a_RF = gelu(h_RF, overwrite=not kept)
        return linear_add(a_RF, x_RD, fc2_w.to(dtype), fc2_b.to(dtype))

    @staticmethod
    def backward(ctx, dy_RD):  # type: ignore[no-untyped-def]
        x_RD, norm_w, norm_b, fc1_w, fc1_b, fc2_w, *kept = ctx.saved_tensors
        dtype, eps = ctx.dtype, ctx.eps
        dy = dy_RD.to(dtype)
        h_RF = (
            kept[0]
            if kept
            else linear(
                layer_norm(x_RD, norm_w, norm_b, eps, dtype), fc1_w.to(dtype), fc1_b.to(dtype)
            )
        )
        dh_RF, a_RF, dfc1_b = gelu_backward(
            h_RF, grad_input(dy, fc2_w.to(dtype)), overwrite=not (kept and needed_again(h_RF))
        )
        dfc2_w = grad_weight(dy, a_RF).to(fc2_w.dtype)
        del h_RF, a_RF, kept
        dx_RD, n_RD, dnorm_w, dnorm_b, dfc2_b = layer_norm_backward(
            grad_input(dh_RF, fc1_w.to(dtype)), x_RD, dy_RD, norm_w, norm_b, eps
        )
        dfc1_w = grad_weight(dh_RF, n_RD).to(fc1_w.dtype)
        dfc1_b, dfc2_b = dfc1_b.to(fc1_w.dtype), dfc2_b.to(fc2_w.dtype)
        return dx_RD, dnorm_w, dnorm_b, dfc1_w, dfc1_b, dfc2_w, dfc2_b, None, None
