"""The two halves of a block on a CPU, each one autograd node written by hand.

On a CPU a block spends much of its time outside the products: allocating, copying and adding. Here
- the residual and the bias are the matrix a product accumulates into, not passes of their own;
- q and k are rotated in place in the packed qkv, and turned back while their gradients are packed;
- LayerNorm's and GELU's outputs are recomputed in the backward, not saved: 10 widths a token are
  kept instead of 20. The numbers are those of block.py to rounding. Under CPU autocast the
  products run in bfloat16 on the residual stream's own dtype, with float32 gradients of the
  weights.

Shapes: R packed rows, D width, H heads, C head channels, F MLP width.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastjepa.model.segments import Segment
from fastjepa_kernels.rope3d.op import as_factor, rotate_into

if TYPE_CHECKING:
    from fastjepa.model.block import Attention, Mlp

aten = torch.ops.aten


def attention_half(
    x_RD: Tensor,
    norm: nn.LayerNorm,
    attn: "Attention",
    tables: Sequence[Tensor],
    segments: Sequence[Segment],
) -> Tensor:
    """`x + proj(attention(rope(qkv(norm(x)))))`: [R, D] -> [R, D]."""
    out: Tensor = _AttentionHalf.apply(
        x_RD, norm.weight, norm.bias, attn.qkv.weight, attn.qkv.bias, attn.proj.weight,
        attn.proj.bias, norm.eps, attn.heads, tuple(tables), tuple(segments),
    )  # type: ignore[no-untyped-call]  # fmt: skip
    return out


def mlp_half(x_RD: Tensor, norm: nn.LayerNorm, mlp: "Mlp") -> Tensor:
    """`x + fc2(gelu(fc1(norm(x))))`: [R, D] -> [R, D]."""
    out: Tensor = _MlpHalf.apply(
        x_RD, norm.weight, norm.bias, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias,
        norm.eps,
    )  # type: ignore[no-untyped-call]  # fmt: skip
    return out


def _product_dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _normed(x_RD: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Any:
    """LayerNorm in x's dtype, its output in `dtype`, with mean and 1/std."""
    n, mean, rstd = aten.native_layer_norm(x_RD, x_RD.shape[-1:], weight, bias, eps)
    return n.to(dtype), mean, rstd


def _norm_backward(
    dn_RD: Tensor, x_RD: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> Any:
    return aten.native_layer_norm_backward(
        dn_RD.to(x_RD.dtype), x_RD, x_RD.shape[-1:], mean, rstd, weight, bias, [True, True, True]
    )


def _residual(x_RD: Tensor, bias_D: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """x + bias, and whether a product of `dtype` can accumulate into it."""
    return x_RD + bias_D.to(x_RD.dtype), x_RD.dtype == dtype


def _weight_grad(dy_RE: Tensor, x_RD: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a Linear's weight [E, D] and bias [E], in the weight's dtype."""
    return (dy_RE.t() @ x_RD).to(like.dtype), dy_RE.sum(0, dtype=like.dtype)


class _AttentionHalf(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x_RD, norm_w, norm_b, qkv_w, qkv_b, proj_w, proj_b, eps, heads, tables, segments
    ) -> Tensor:
        dtype = _product_dtype(x_RD)
        n_RD, mean, rstd = _normed(x_RD, norm_w, norm_b, eps, dtype)
        qkv_R3HC = torch.addmm(qkv_b.to(dtype), n_RD, qkv_w.to(dtype).t()).unflatten(
            -1, (3, heads, -1)
        )
        del n_RD
        y_RD, accumulates = _residual(x_RD, proj_b, dtype)
        project = proj_w.to(dtype).t()
        kept = []
        for segment, table in zip(segments, tables, strict=True):
            qkv = segment.rows(qkv_R3HC)
            qk = qkv[:, :, :2]
            rotate_into(qk, as_factor(table)[:, :, None, None], qk)
            q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
            out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
            y, o = (
                y_RD[segment.start : segment.stop],
                out.transpose(1, 2).reshape(-1, x_RD.shape[-1]),
            )
            if accumulates:
                y.addmm_(o, project)
            else:
                y += o @ project
            kept += [out, lse]
        ctx.save_for_backward(
            x_RD, mean, rstd, norm_w, norm_b, qkv_w, proj_w, qkv_R3HC, *tables, *kept
        )
        ctx.segments, ctx.eps = segments, eps
        return y_RD

    @staticmethod
    def backward(ctx, dy_RD):  # type: ignore[no-untyped-def]
        x_RD, mean, rstd, norm_w, norm_b, qkv_w, proj_w, qkv_R3HC, *rest = ctx.saved_tensors
        segments, dtype, width = ctx.segments, qkv_R3HC.dtype, x_RD.shape[-1]
        tables, kept = rest[: len(segments)], rest[len(segments) :]
        dy = dy_RD.to(dtype)
        project = proj_w.to(dtype)
        do_RD = dy @ project
        dproj_w = torch.zeros_like(proj_w)
        dqkv_R3HC = torch.empty_like(qkv_R3HC)
        for i, (segment, table) in enumerate(zip(segments, tables, strict=True)):
            out, lse = kept[2 * i : 2 * i + 2]
            part = slice(segment.start, segment.stop)
            o = out.transpose(1, 2).reshape(-1, width)
            if dtype == proj_w.dtype:
                dproj_w.addmm_(dy[part].t(), o)
            else:
                dproj_w += dy[part].t() @ o
            do = (
                do_RD[part].view(segment.count, segment.length, *qkv_R3HC.shape[2:]).transpose(1, 2)
            )
            q, k, v = (t.transpose(1, 2) for t in segment.rows(qkv_R3HC).unbind(2))
            dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                do, q, k, v, out, lse, 0.0, False
            )
            back = as_factor(table, inverse=True)[:, :, None]
            dqkv = segment.rows(dqkv_R3HC)
            rotate_into(dq.transpose(1, 2), back, dqkv[:, :, 0])
            rotate_into(dk.transpose(1, 2), back, dqkv[:, :, 1])
            dqkv[:, :, 2].copy_(dv.transpose(1, 2))
        dproj_b = dy_RD.sum(0, dtype=proj_w.dtype)
        dqkv = dqkv_R3HC.flatten(1)
        n_RD, _, _ = _normed(x_RD, norm_w, norm_b, ctx.eps, dtype)
        dqkv_w, dqkv_b = _weight_grad(dqkv, n_RD, qkv_w)
        dx_RD, dnorm_w, dnorm_b = _norm_backward(
            dqkv @ qkv_w.to(dtype), x_RD, mean, rstd, norm_w, norm_b
        )
        dx_RD += dy_RD
        return dx_RD, dnorm_w, dnorm_b, dqkv_w, dqkv_b, dproj_w, dproj_b, None, None, None, None


class _MlpHalf(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RD, norm_w, norm_b, fc1_w, fc1_b, fc2_w, fc2_b, eps) -> Tensor:  # type: ignore[no-untyped-def]
        dtype = _product_dtype(x_RD)
        n_RD, mean, rstd = _normed(x_RD, norm_w, norm_b, eps, dtype)
        h_RF = torch.addmm(fc1_b.to(dtype), n_RD, fc1_w.to(dtype).t())
        a_RF = aten.gelu(h_RF) if any(ctx.needs_input_grad) else aten.gelu_(h_RF)
        y_RD, accumulates = _residual(x_RD, fc2_b, dtype)
        if accumulates:
            y_RD.addmm_(a_RF, fc2_w.to(dtype).t())
        else:
            y_RD += a_RF @ fc2_w.to(dtype).t()
        ctx.save_for_backward(x_RD, mean, rstd, norm_w, norm_b, fc1_w, fc2_w, h_RF)
        ctx.eps = eps
        return y_RD

    @staticmethod
    def backward(ctx, dy_RD):  # type: ignore[no-untyped-def]
        x_RD, mean, rstd, norm_w, norm_b, fc1_w, fc2_w, h_RF = ctx.saved_tensors
        dtype = h_RF.dtype
        dy = dy_RD.to(dtype)
        dfc2_w, dfc2_b = _weight_grad(dy, aten.gelu(h_RF), fc2_w)
        dh_RF = aten.gelu_backward(dy @ fc2_w.to(dtype), h_RF)
        del h_RF
        n_RD, _, _ = _normed(x_RD, norm_w, norm_b, ctx.eps, dtype)
        dfc1_w, dfc1_b = _weight_grad(dh_RF, n_RD, fc1_w)
        dx_RD, dnorm_w, dnorm_b = _norm_backward(
            dh_RF @ fc1_w.to(dtype), x_RD, mean, rstd, norm_w, norm_b
        )
        dx_RD += dy_RD
        return dx_RD, dnorm_w, dnorm_b, dfc1_w, dfc1_b, dfc2_w, dfc2_b, None
