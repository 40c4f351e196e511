"""Dense L1-type loss of predictions against the target encoder's raw levels.

Up to the upstream scalar the gradient is known in the forward (for p = 1 it is sign x weight), so
nothing of size [R, E] is kept but the gradient itself. The kernel (kernel.py), the C++ for CPUs
with AVX-512 (avx512.py) and their twin (twin.py) all read a prediction and its raw target row once
and write the gradient in that pass.

Shapes: R rows, E = L D channels, L levels, D width, G mask groups, M target rows.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..backend import Backend, use_triton
from ..library import custom_op
from ..precision import wide
from . import avx512, twin
from .comparison import Comparison, GroupWeights, checked
from .gradient import scaled

# What the kernel holds in registers and unrolls; the twin takes any number.
MOST_WIDTH, MOST_GROUPS, MOST_LEVELS = 16384, 64, 16


def dense_l1(
    z_RE: Tensor,
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
    overwrite_prediction: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Dense loss of all mask groups at once: `sum_g v_g mean_{r in g, c} w_r |z - y|^p / p`
    (docs/method.md section 5).

    z_RE: predictions [R, L*D], levels side by side, the rows of group 0 first. targets_MD: L
    tensors [M, D], raw; slices of one wide tensor are as good as separate ones. Each row is
    normalised (no affine, `eps`) when it is read, or compared as it is without
    `normalize_target`; rows that no index names are never touched. row_R: [R] int32 or int64, the
    target row of each prediction. group_sizes: rows of each group; an empty one counts as 0.
    token_weight_R: w [R], 1 if None. level_weights: beta [L], 1/L each if None. group_weights: v,
    G numbers or a tensor [G], 1/G each if None. exponent: p. smooth: the width beta of smooth L1
    (`d^2 / (2 beta)` below it, `|d| - beta/2` above), 0 for none; only with p = 1.
    normalize_prediction: the same norm for z. overwrite_prediction: the gradient is written in
    z's memory, whose values are lost; without a gradient nothing is written.

    Any mixture of float32, bfloat16 and float16; computed in float32 (float64, on the twin only,
    for float64 predictions). Returns the 0-d total, differentiable once for z (sign(0) = 0), and
    the terms [G, L], means without beta and v. Raises ValueError for what does not fit; indices
    are looked at where that is free (checks.py).
    """
    if z_RE.ndim != 2:
        raise ValueError(f"prediction: expected [R, E], got {tuple(z_RE.shape)}")
    comparison = checked(
        z_RE, z_RE.shape[1], targets_MD, row_R, group_sizes, token_weight_R, level_weights,
        group_weights, exponent, smooth, normalize_target, normalize_prediction, eps,
    )  # fmt: skip
    grad = torch.is_grad_enabled() and z_RE.requires_grad
    if not (overwrite_prediction and grad):
        total, terms_GL, _ = _dense_l1(z_RE, *comparison, grad, backend)
        return total, terms_GL
    if z_RE.stride(1) != 1 or z_RE.stride(0) < z_RE.shape[1]:
        raise ValueError(
            "prediction: expected channels side by side and rows apart to overwrite them, "
            f"got strides {z_RE.stride()}"
        )
    total, terms_GL = _Overwriting.apply(z_RE, comparison, backend)  # type: ignore[no-untyped-call]
    return total, terms_GL


@custom_op("dense_l1")
def _dense_l1(
    z_RE: Tensor, targets_MD: list[Tensor], row_R: Tensor, token_weight_R: Tensor | None,
    group_factor_G: Tensor | None, group_sizes: list[int], group_weights: list[float],
    level_weights: list[float], exponent: float, smooth: float, normalize_target: bool,
    normalize_prediction: bool, eps: float, grad: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    comparison = Comparison(
        targets_MD, row_R, token_weight_R, group_factor_G, group_sizes, group_weights,
        level_weights, exponent, smooth, normalize_target, normalize_prediction, eps,
    )  # fmt: skip
    dz_RE = z_RE.new_empty(z_RE.shape if grad else (0,))
    total, terms_GL = _loss(comparison, z_RE, dz_RE if grad else None, backend)
    return total, terms_GL, dz_RE


@_dense_l1.register_fake
def _(z_RE: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad = rest[-2]
    total, terms_GL = losses_like(z_RE, Comparison(*rest[:-2]))
    return total, terms_GL, z_RE.new_empty(z_RE.shape if grad else (0,))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    z_RE, *compared, _, backend = inputs
    _, terms_GL, dz_RE = output
    comparison = Comparison(*compared)
    ctx.mark_non_differentiable(terms_GL, dz_RE)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dz_RE)
    ctx.num_levels, ctx.backend = len(comparison.targets_MD), backend
    ctx.factor = 1.0 / comparison.gradient_scale(z_RE.dtype)


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Any, ...]:
    (dz_RE,) = ctx.saved_tensors
    grad_RE = scaled(dz_RE, upstream, ctx.factor, ctx.backend)
    return grad_RE, [None] * ctx.num_levels, *(None,) * 13


_dense_l1.register_autograd(_backward, setup_context=_keep)


@custom_op("dense_l1_", mutates=["z_RE"])
def _dense_l1_(
    z_RE: Tensor, targets_MD: list[Tensor], row_R: Tensor, token_weight_R: Tensor | None,
    group_factor_G: Tensor | None, group_sizes: list[int], group_weights: list[float],
    level_weights: list[float], exponent: float, smooth: float, normalize_target: bool,
    normalize_prediction: bool, eps: float, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    comparison = Comparison(
        targets_MD, row_R, token_weight_R, group_factor_G, group_sizes, group_weights,
        level_weights, exponent, smooth, normalize_target, normalize_prediction, eps,
    )  # fmt: skip
    return _loss(comparison, z_RE, z_RE, backend)


@_dense_l1_.register_fake
def _(z_RE: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return losses_like(z_RE, Comparison(*rest[:-1]))


class _Overwriting(torch.autograd.Function):
    """The same op with the gradient in the prediction's memory."""

    @staticmethod
    def forward(ctx: Any, z_RE: Tensor, comparison: Comparison, backend: str) -> Any:
        total, terms_GL = _dense_l1_(z_RE, *comparison, backend)
        ctx.save_for_backward(z_RE)
        ctx.mark_non_differentiable(terms_GL)
        ctx.backend = backend
        ctx.factor = 1.0 / comparison.gradient_scale(z_RE.dtype)
        return total, terms_GL

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _terms: Tensor) -> tuple[Any, None, None]:
        (dz_RE,) = ctx.saved_tensors
        return scaled(dz_RE, upstream, ctx.factor, ctx.backend), None, None


def losses_like(prediction: Tensor, comparison: Comparison) -> tuple[Tensor, Tensor]:
    """Total and terms as they will be: shapes and dtype without values."""
    dtype = wide(prediction.dtype)
    shape_GL = (len(comparison.group_sizes), len(comparison.targets_MD))
    return prediction.new_empty((), dtype=dtype), prediction.new_empty(shape_GL, dtype=dtype)


def implementation(backend: str, prediction: Tensor, comparison: Comparison) -> ModuleType:
    """kernel.py, avx512.py or twin.py: all have `compare` and `finish`.

    Raises ValueError where the kernel was asked for and does not take these inputs.
    """
    if not use_triton(backend, prediction):
        ours = backend == "auto" and avx512.refusal(prediction, comparison) is None
        return avx512 if ours else twin
    for what, found, most in (
        ("bytes a number", prediction.element_size(), 4),
        ("channels a level", comparison.width, MOST_WIDTH),
        ("groups", len(comparison.group_sizes), MOST_GROUPS),
        ("levels", len(comparison.targets_MD), MOST_LEVELS),
    ):
        if found <= most:
            continue
        if backend == "triton":
            raise ValueError(f"backend: triton takes at most {most} {what}, got {found}")
        return twin
    from . import kernel

    return kernel


def new_sums(prediction: Tensor, levels: int) -> Tensor:
    """Room for the loss of each row and level, [R, L], a level's rows side by side."""
    dtype = wide(prediction.dtype)
    return prediction.new_empty((levels, len(prediction)), dtype=dtype).t()


def _loss(
    comparison: Comparison, z_RE: Tensor, dz_RE: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    comparison.check_values()
    either = implementation(backend, z_RE, comparison)
    sums_RL = new_sums(z_RE, len(comparison.targets_MD))
    scale = comparison.gradient_scale(z_RE.dtype)
    either.compare(comparison, z_RE, 0, sums_RL, dz_RE, scale)
    total, terms_GL = either.finish(comparison, sums_RL)
    return total, terms_GL
