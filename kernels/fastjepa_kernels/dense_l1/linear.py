"""The dense loss straight from the inputs of a linear head, a chunk of rows at a time: neither the
prediction [R, L*D] nor its gradient ever exists.

A chunk's prediction comes from one product, is turned into its gradient in place, and goes into
the gradients of input, weight and bias by two more. Chunks follow one another in order and the
weight's gradient adds up in float32, so two runs give the same bits.

Shapes: R rows, P input width of the head, E = L D channels, L levels, D width, G mask groups, M
target rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backend import Backend
from ..block_passes.op import column_sums
from ..checks import check_same_device
from ..library import custom_op, must_be_one_op, on_their_device
from ..precision import as_multiplied, wide
from .comparison import Comparison, GroupWeights, checked
from .gradient import scaled
from .op import implementation, losses_like, new_sums

# Rows at once on a CPU: enough for the products to run well.
CHUNK_ROWS = 512
# On a GPU a chunk of the prediction takes this much memory, or a 16th of the whole if that is
# less, yet never fewer rows than keep the products busy.
CHUNK_BYTES, LEAST_ROWS = 2**25, 1024


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
    group_weights: GroupWeights | None = None,
    exponent: float = 1.0,
    smooth: float = 0.0,
    normalize_target: bool = True,
    normalize_prediction: bool = False,
    eps: float = 1e-5,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """`dense_l1` of `x W^T + b` without the prediction in memory (docs/method.md section 5).

    x_RP: [R, P], the dtype the head runs in. weight_EP: [L*D, P], bias_E: [L*D]; their gradients
    add up in float32 whatever their dtype. The rest, the result and the errors as in `dense_l1`.
    The forward yields the gradients of x, W and b too; the backward only scales them.
    """
    if weight_EP.ndim != 2 or x_RP.ndim != 2 or weight_EP.shape[1] != x_RP.shape[1]:
        raise ValueError(
            f"weight: expected [E, {x_RP.shape[-1]}] for x {tuple(x_RP.shape)}, "
            f"got {tuple(weight_EP.shape)}"
        )
    if bias_E.shape != weight_EP.shape[:1]:
        raise ValueError(f"bias: expected [{len(weight_EP)}], got {tuple(bias_E.shape)}")
    check_same_device(prediction=x_RP, weight=weight_EP, bias=bias_E)
    x_RP = as_multiplied(x_RP)
    comparison = checked(
        x_RP, weight_EP.shape[0], targets_MD, row_R, group_sizes, token_weight_R, level_weights,
        group_weights, exponent, smooth, normalize_target, normalize_prediction, eps,
    )  # fmt: skip
    leaves = (x_RP, weight_EP, bias_E)
    grad = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)
    if must_be_one_op(*leaves, *comparison.targets_MD):
        total, terms_GL, *_ = _linear_dense_l1(*leaves, *comparison, grad, backend)
    elif grad:
        total, terms_GL = _Loss.apply(*leaves, comparison, backend)  # type: ignore[no-untyped-call]
    else:
        total, terms_GL, *_ = _loss_and_gradients(*leaves, comparison, False, backend)
    return total, terms_GL


def chunk_rows(rows: int, row_bytes: int, device: torch.device) -> int:
    """Rows whose prediction is held at once."""
    if device.type == "cpu":
        return CHUNK_ROWS
    fitting = min(CHUNK_BYTES // row_bytes, rows // 16)
    return max(LEAST_ROWS, fitting // 128 * 128)


@on_their_device
def _loss_and_gradients(
    x_RP: Tensor, weight_EP: Tensor, bias_E: Tensor, comparison: Comparison, grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    comparison.check_values()
    rows, channels = len(x_RP), len(weight_EP)
    # Autocast, whose choice of dtype was made before x came here, stays out of the products.
    with torch.autocast(x_RP.device.type, enabled=False):
        weight, bias = weight_EP.to(x_RP.dtype), bias_E.to(x_RP.dtype)
        gradients = _empty_gradients(x_RP, weight_EP, grad)
        dx_RP, dweight_EP, dbias_E = gradients
        dweight_EP.zero_(), dbias_E.zero_()
        either = implementation(backend, x_RP, comparison)
        sums_RL = new_sums(x_RP, len(comparison.targets_MD))
        scale = comparison.gradient_scale(x_RP.dtype)
        step = chunk_rows(rows, channels * x_RP.element_size(), x_RP.device)
        whole_rE = x_RP.new_empty((min(step, rows), channels))
        for low in range(0, rows, step):
            x_rP = x_RP[low : low + step]
            z_rE = torch.addmm(bias, x_rP, weight.t(), out=whole_rE[: len(x_rP)])
            either.compare(comparison, z_rE, low, sums_RL, z_rE if grad else None, scale)
            if not grad:
                continue
            dbias_E += column_sums(z_rE, backend=backend)  # type: ignore[arg-type]
            torch.mm(z_rE, weight, out=dx_RP[low : low + step])
            if dweight_EP.dtype == x_RP.dtype:
                dweight_EP.addmm_(z_rE.t(), x_rP)
            else:
                dweight_EP += z_rE.t() @ x_rP
        total, terms_GL = either.finish(comparison, sums_RL)
    return total, terms_GL, *gradients


def _empty_gradients(x_RP: Tensor, weight_EP: Tensor, grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients of x, W and b, the latter two in the dtype they add up in."""
    dtype = wide(x_RP.dtype)
    shapes = (x_RP.shape, weight_EP.shape, weight_EP.shape[:1]) if grad else ((0,),) * 3
    dx_RP, dweight_EP, dbias_E = (
        x_RP.new_empty(shape, dtype=kept)
        for shape, kept in zip(shapes, (x_RP.dtype, dtype, dtype), strict=True)
    )
    return dx_RP, dweight_EP, dbias_E


@custom_op("linear_dense_l1")
def _linear_dense_l1(
    x_RP: Tensor, weight_EP: Tensor, bias_E: Tensor, targets_MD: list[Tensor], row_R: Tensor,
    token_weight_R: Tensor | None, group_factor_G: Tensor | None, group_sizes: list[int],
    group_weights: list[float], level_weights: list[float], exponent: float, smooth: float,
    normalize_target: bool, normalize_prediction: bool, eps: float, grad: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    comparison = Comparison(
        targets_MD, row_R, token_weight_R, group_factor_G, group_sizes, group_weights,
        level_weights, exponent, smooth, normalize_target, normalize_prediction, eps,
    )  # fmt: skip
    return _loss_and_gradients(x_RP, weight_EP, bias_E, comparison, grad, backend)


@_linear_dense_l1.register_fake
def _(
    x_RP: Tensor, weight_EP: Tensor, bias_E: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    total, terms_GL = losses_like(x_RP, Comparison(*rest[:-2]))
    return total, terms_GL, *_empty_gradients(x_RP, weight_EP, rest[-2])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *leaves, backend = *inputs[:3], inputs[-1]
    _, terms_GL, *gradients = output
    comparison = Comparison(*inputs[3:-2])
    ctx.mark_non_differentiable(terms_GL, *gradients)
    ctx.num_levels = len(comparison.targets_MD)
    _keep_gradients(ctx, leaves, comparison, backend, gradients)


def _keep_gradients(
    ctx: Any, leaves: Sequence[Tensor], comparison: Comparison, backend: str,
    gradients: Sequence[Tensor],
) -> None:  # fmt: skip
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients)
    ctx.dtypes = [leaf.dtype for leaf in leaves]
    ctx.backend, ctx.factor = backend, 1.0 / comparison.gradient_scale(leaves[0].dtype)


def _gradients(ctx: Any, upstream: Tensor | None) -> list[Tensor | None]:
    """Of x, W and b."""
    found = [
        scaled(stored, upstream, ctx.factor, ctx.backend) if needed else None
        for stored, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
    ]
    return [
        None if gradient is None else gradient.to(dtype)
        for gradient, dtype in zip(found, ctx.dtypes, strict=True)
    ]


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Any, ...]:
    return *_gradients(ctx, upstream), [None] * ctx.num_levels, *(None,) * 13


_linear_dense_l1.register_autograd(_backward, setup_context=_keep)


class _Loss(torch.autograd.Function):
    """The op where nothing has to see it as one."""

    @staticmethod
    def forward(
        ctx: Any, x_RP: Tensor, weight_EP: Tensor, bias_E: Tensor, comparison: Comparison,
        backend: str,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        leaves = (x_RP, weight_EP, bias_E)
        total, terms_GL, *gradients = _loss_and_gradients(*leaves, comparison, True, backend)
        ctx.mark_non_differentiable(terms_GL)
        _keep_gradients(ctx, leaves, comparison, backend, gradients)
        return total, terms_GL

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, upstream), None, None
