"""The dense loss without its copies: targets are gathered and normalised a few rows at a time,
and the gradient is written while the difference is at hand.

Up to the upstream scalar the gradient is known in the forward (for p = 1 it is sign x weight), so
nothing of size [R, E] is saved but the gradient itself; `linear_dense_l1` does not even keep
that, nor the prediction.

Shapes: R rows, E = L D channels, L levels, D width, G mask groups, M target rows, P input width
of the head.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# Rows handled at once: small enough for the temporaries to stay in the cache, large enough for
# the products.
CHUNK_ROWS = 512


@dataclass(frozen=True)
class _Target:
    """What a prediction is compared with, and how."""

    targets_MD: tuple[Tensor, ...]
    row_R: Tensor
    group_sizes: tuple[int, ...]
    token_weight_R: Tensor | None
    beta_L: Tensor
    exponent: float
    normalize_prediction: bool
    eps: float

    def chunks(self) -> Iterator[tuple[int, slice]]:
        """(group, rows) slices that never cross a group."""
        start = 0
        for group, size in enumerate(self.group_sizes):
            for low in range(start, start + size, CHUNK_ROWS):
                yield group, slice(low, min(low + CHUNK_ROWS, start + size))
            start += size

    def compare(
        self, z_rE: Tensor, group: int, rows: slice, *, grad: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Loss terms [L] of some rows and, if asked, the total's gradient for them [r, E]."""
        levels, width = len(self.targets_MD), self.targets_MD[0].shape[-1]
        wide = self.beta_L.dtype
        index_r = self.row_R[rows]
        y_LrD = torch.empty((levels, len(index_r), width), dtype=wide, device=z_rE.device)
        for y_rD, target_MD in zip(y_LrD, self.targets_MD, strict=True):
            y_rD.copy_(target_MD.index_select(0, index_r))
        y_LrD = F.layer_norm(y_LrD, (width,), eps=self.eps)
        z_LrD = z_rE.to(wide).unflatten(-1, (levels, width)).transpose(0, 1)
        if self.normalize_prediction:
            raw_LrD = z_LrD.contiguous()
            z_LrD, mean, rstd = torch.native_layer_norm(raw_LrD, [width], None, None, self.eps)
        diff_LrD = torch.sub(z_LrD, y_LrD, out=y_LrD)

        share_r = torch.full(
            (len(index_r),), 1.0 / self.group_sizes[group], dtype=wide, device=z_rE.device
        )
        if self.token_weight_R is not None:
            share_r *= self.token_weight_R[rows]
        size_LrD = diff_LrD.abs()
        if self.exponent == 1.0:
            terms_L = size_LrD.sum(-1) @ share_r / width
        else:
            terms_L = size_LrD.pow(self.exponent).sum(-1) @ share_r / (width * self.exponent)
        if not grad:
            return terms_L, None

        scale_Lr1 = (self.beta_L[:, None] * share_r / (width * len(self.group_sizes)))[..., None]
        dz_LrD = diff_LrD.sign_().mul_(scale_Lr1)
        if self.exponent != 1.0:
            dz_LrD *= size_LrD.pow_(self.exponent - 1.0)
        if self.normalize_prediction:
            dz_LrD = torch.ops.aten.native_layer_norm_backward(
                dz_LrD, raw_LrD, [width], mean, rstd, None, None, [True, False, False]
            )[0]
        return terms_L, dz_LrD.transpose(0, 1).reshape(z_rE.shape)

    def total(self, terms_GL: Tensor) -> Tensor:
        return (terms_GL * self.beta_L).sum(-1).mean()

    def new_terms(self) -> Tensor:
        return self.beta_L.new_zeros((len(self.group_sizes), len(self.targets_MD)))


class _DenseL1(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z_RE: Tensor, target: _Target) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        grad = ctx.needs_input_grad[0]
        terms_GL = target.new_terms()
        dz_RE = torch.empty_like(z_RE) if grad else None
        for group, rows in target.chunks():
            terms_L, dz_rE = target.compare(z_RE[rows], group, rows, grad=grad)
            terms_GL[group] += terms_L
            if dz_RE is not None and dz_rE is not None:
                dz_RE[rows] = dz_rE
        ctx.save_for_backward(dz_RE)
        ctx.mark_non_differentiable(terms_GL)
        return target.total(terms_GL), terms_GL

    @staticmethod
    def backward(ctx, upstream: Tensor, _terms: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        (dz_RE,) = ctx.saved_tensors
        return dz_RE * upstream.to(dz_RE.dtype), None


class _LinearDenseL1(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x_RP: Tensor, weight_EP: Tensor, bias_E: Tensor, target: _Target
    ) -> tuple[Tensor, Tensor]:
        grad = any(ctx.needs_input_grad)
        terms_GL = target.new_terms()
        # The head runs in x's dtype (bfloat16 under autocast); its gradients add up in the
        # weights' own.
        weight, bias = weight_EP.to(x_RP.dtype), bias_E.to(x_RP.dtype)
        if grad:
            dx_RP = torch.empty_like(x_RP)
            dweight_EP, dbias_E = torch.zeros_like(weight_EP), torch.zeros_like(bias_E)
        for group, rows in target.chunks():
            z_rE = torch.addmm(bias, x_RP[rows], weight.t())
            terms_L, dz_rE = target.compare(z_rE, group, rows, grad=grad)
            terms_GL[group] += terms_L
            if dz_rE is None:
                continue
            dbias_E += dz_rE.sum(0)
            dz_rE = dz_rE.to(x_RP.dtype)
            torch.mm(dz_rE, weight, out=dx_RP[rows])
            if weight_EP.dtype == x_RP.dtype:
                dweight_EP.addmm_(dz_rE.t(), x_RP[rows])
            else:
                dweight_EP += dz_rE.t() @ x_RP[rows]
        if grad:
            ctx.save_for_backward(dx_RP, dweight_EP, dbias_E)
        ctx.mark_non_differentiable(terms_GL)
        return target.total(terms_GL), terms_GL

    @staticmethod
    def backward(  # type: ignore[no-untyped-def]
        ctx, upstream: Tensor, _terms: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        dx_RP, dweight_EP, dbias_E = ctx.saved_tensors
        scaled = [d * upstream.to(d.dtype) for d in (dx_RP, dweight_EP, dbias_E)]
        return scaled[0], scaled[1], scaled[2], None


def _checked(
    prediction: Tensor,
    channels: int,
    targets_MD: Sequence[Tensor],
    row_R: Tensor,
    group_sizes: Sequence[int],
    token_weight_R: Tensor | None,
    level_weights: Sequence[float] | None,
    exponent: float,
    normalize_prediction: bool,
    eps: float,
) -> _Target:
    if not targets_MD or any(t.ndim != 2 or t.shape != targets_MD[0].shape for t in targets_MD):
        shapes = [tuple(t.shape) for t in targets_MD]
        raise ValueError(f"targets: expected equal shapes [M, D], one tensor a level, got {shapes}")
    num_rows, width = targets_MD[0].shape
    rows, levels = len(prediction), len(targets_MD)
    if channels != levels * width:
        raise ValueError(
            f"prediction: expected {levels} levels x {width} = {levels * width} channels, "
            f"got {channels}"
        )
    if row_R.shape != (rows,) or row_R.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"row: expected int32 or int64 [{rows}], got {row_R.dtype} {tuple(row_R.shape)}"
        )
    if (
        row_R.device.type == "cpu"
        and rows
        and not 0 <= int(row_R.min()) <= int(row_R.max()) < num_rows
    ):
        raise ValueError(
            f"row: values {int(row_R.min())}..{int(row_R.max())} leave the targets' {num_rows} rows"
        )
    if not group_sizes or sum(group_sizes) != rows or min(group_sizes) < 1:
        raise ValueError(
            f"group_sizes: expected positive sizes that add up to {rows}, got {group_sizes}"
        )
    if token_weight_R is not None and token_weight_R.shape != (rows,):
        raise ValueError(f"token_weight: expected [{rows}], got {tuple(token_weight_R.shape)}")
    beta = tuple(level_weights) if level_weights is not None else (1.0 / levels,) * levels
    if len(beta) != levels:
        raise ValueError(f"level_weights: expected {levels} values, got {len(beta)}")
    if exponent <= 0.0:
        raise ValueError(f"exponent: expected a positive number, got {exponent}")
    wide = torch.float64 if prediction.dtype == torch.float64 else torch.float32
    beta_L = torch.tensor(beta, dtype=wide, device=prediction.device)
    return _Target(
        tuple(t.detach() for t in targets_MD), row_R, tuple(group_sizes), token_weight_R, beta_L,
        exponent, normalize_prediction, eps,
    )  # fmt: skip


def dense_l1(
    z_RE: Tensor,
    targets_MD: Sequence[Tensor],
    row_R: Tensor,
    group_sizes: Sequence[int],
    *,
    token_weight_R: Tensor | None = None,
    level_weights: Sequence[float] | None = None,
    exponent: float = 1.0,
    normalize_prediction: bool = False,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Dense loss of all mask groups at once: `mean_g mean_{r in g, c} w_r |z - y|^p / p`
    (docs/method.md section 5).

    z_RE: predictions [R, L*D], levels side by side, the rows of group 0 first. targets_MD: L
    tensors [M, D], raw; each row is normalised (no affine, `eps`) when it is read, rows that no
    index names are never touched. row_R: [R] the target row of each prediction. group_sizes: rows
    of each group. token_weight_R: [R] or None. level_weights: beta [L], 1/L each if None.
    Computed in float32 (float64 for float64). Returns the 0-d total (differentiable for z;
    sign(0) = 0) and the terms [G, L], means without beta. Raises ValueError for anything that
    does not fit.
    """
    if z_RE.ndim != 2:
        raise ValueError(f"prediction: expected [R, E], got {tuple(z_RE.shape)}")
    target = _checked(
        z_RE, z_RE.shape[1], targets_MD, row_R, group_sizes, token_weight_R, level_weights,
        exponent, normalize_prediction, eps,
    )  # fmt: skip
    total, terms_GL = _DenseL1.apply(z_RE, target)  # type: ignore[no-untyped-call]
    return total, terms_GL


def linear_dense_l1(
    x_RP: Tensor,
    weight_EP: Tensor,
    bias_E: Tensor,
    targets_MD: Sequence[Tensor],
    row_R: Tensor,
    group_sizes: Sequence[int],
    *,
    token_weight_R: Tensor | None = None,
    level_weights: Sequence[float] | None = None,
    exponent: float = 1.0,
    normalize_prediction: bool = False,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """`dense_l1` of `x W^T + b`, a few hundred rows at a time: the prediction [R, L*D] never
    exists.

    x_RP: [R, P], the dtype the head runs in. weight_EP: [L*D, P], bias_E: [L*D]. The rest as in
    `dense_l1`. The forward yields the gradients of x, W and b too; the backward only scales them.
    """
    if weight_EP.ndim != 2 or x_RP.ndim != 2 or weight_EP.shape[1] != x_RP.shape[1]:
        raise ValueError(
            f"weight: expected [E, {x_RP.shape[-1]}] for x {tuple(x_RP.shape)}, "
            f"got {tuple(weight_EP.shape)}"
        )
    target = _checked(
        x_RP, weight_EP.shape[0], targets_MD, row_R, group_sizes, token_weight_R,
        level_weights, exponent, normalize_prediction, eps,
    )  # fmt: skip
    total, terms_GL = _LinearDenseL1.apply(x_RP, weight_EP, bias_E, target)  # type: ignore[no-untyped-call]
    return total, terms_GL
