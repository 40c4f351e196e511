"""What predictions are compared with, and how: the checked arguments of both loss ops.

Shapes: R rows, E = L D channels, L levels, D width, G mask groups, M target rows.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import INDEX_DTYPES, check_in_range, check_same_device

GroupWeights = Sequence[float] | Tensor


class Comparison(NamedTuple):
    """The arguments an op passes on, in the order of its schema.

    The weight of group g is `group_weights[g]`, times `group_factor_G[g]` where that is given: the
    first are numbers of the host, the second live on the device.
    """

    targets_MD: list[Tensor]
    row_R: Tensor
    token_weight_R: Tensor | None
    group_factor_G: Tensor | None
    group_sizes: list[int]
    group_weights: list[float]
    level_weights: list[float]
    exponent: float
    smooth: float
    normalize_target: bool
    normalize_prediction: bool
    eps: float

    @property
    def width(self) -> int:
        return self.targets_MD[0].shape[1]

    def group_means(self) -> list[float]:
        """What turns a group's sum over rows and channels into its mean of `|z - y|^p / p`."""
        return [1.0 / (max(size, 1) * self.width * self.exponent) for size in self.group_sizes]

    def group_slopes(self) -> list[float]:
        """The weight of a group in the total, over its rows and channels."""
        return [
            weight / (max(size, 1) * self.width)
            for size, weight in zip(self.group_sizes, self.group_weights, strict=True)
        ]

    def gradient_scale(self, dtype: torch.dtype) -> float:
        """The power of two by which the gradient is stored enlarged: its steepest is about one.

        A mean over many numbers has a gradient too small for float16, and the loss scale that
        would lift it comes after it is rounded.
        """
        if dtype != torch.float16:
            return 1.0
        pairs = zip(self.group_slopes(), self.group_sizes, strict=True)
        steepest = max([0.0, *(abs(slope) for slope, size in pairs if size)])
        steepest *= max([abs(weight) for weight in self.level_weights])
        return 2.0 ** -math.frexp(steepest)[1]

    def check_values(self) -> None:
        """Raises ValueError for a target row that does not exist."""
        check_in_range("row", self.row_R, len(self.targets_MD[0]), "targets")


def checked(
    prediction: Tensor,
    channels: int,
    targets_MD: Sequence[Tensor],
    row_R: Tensor,
    group_sizes: Sequence[int],
    token_weight_R: Tensor | None,
    level_weights: Sequence[float] | None,
    group_weights: GroupWeights | None,
    exponent: float,
    smooth: float,
    normalize_target: bool,
    normalize_prediction: bool,
    eps: float,
) -> Comparison:
    """The comparison, or ValueError with the tensor that does not fit. Nothing is copied but
    targets whose channels do not lie side by side."""
    _check_targets(prediction, channels, targets_MD)
    rows, levels, groups = len(prediction), len(targets_MD), len(group_sizes)
    if row_R.shape != (rows,) or row_R.dtype not in INDEX_DTYPES:
        raise ValueError(
            f"row: expected int32 or int64 [{rows}], got {row_R.dtype} {tuple(row_R.shape)}"
        )
    if not groups or min(group_sizes) < 0 or sum(group_sizes) != rows:
        raise ValueError(
            f"group_sizes: expected sizes of 0 or more that add up to {rows}, got {group_sizes}"
        )
    _check_weight("token_weight", token_weight_R, rows)
    factor_G, weights = None, [1.0] * groups
    if isinstance(group_weights, Tensor):
        factor_G = group_weights.detach().contiguous()
        _check_weight("group_weights", factor_G, groups)
    else:
        weights = _numbers("group_weights", group_weights, groups)
    beta = _numbers("level_weights", level_weights, levels)
    check_same_device(
        prediction=prediction, row=row_R, token_weight=token_weight_R, group_weights=factor_G,
        **{f"targets[{level}]": target for level, target in enumerate(targets_MD)},
    )  # fmt: skip
    if not 0.0 < exponent < math.inf:
        raise ValueError(f"exponent: expected a positive number, got {exponent}")
    if not 0.0 <= smooth < math.inf:
        raise ValueError(f"smooth: expected 0 or a positive number, got {smooth}")
    if smooth and exponent != 1.0:
        raise ValueError(f"smooth: expected 0 with exponent {exponent}, got {smooth}")
    return Comparison(
        [target.detach() if target.stride(1) == 1 else target.detach().contiguous()
         for target in targets_MD],
        row_R.contiguous(),
        None if token_weight_R is None else token_weight_R.detach().contiguous(),
        factor_G,
        list(group_sizes), weights, beta, float(exponent), float(smooth), normalize_target,
        normalize_prediction, float(eps),
    )  # fmt: skip


def _check_targets(prediction: Tensor, channels: int, targets_MD: Sequence[Tensor]) -> None:
    if not targets_MD or any(t.ndim != 2 or t.shape != targets_MD[0].shape for t in targets_MD):
        shapes = [tuple(t.shape) for t in targets_MD]
        raise ValueError(f"targets: expected equal shapes [M, D], one tensor a level, got {shapes}")
    width, levels = targets_MD[0].shape[1], len(targets_MD)
    if channels != levels * width or width == 0:
        raise ValueError(
            f"prediction: expected {levels} levels x {width} = {levels * width} channels, "
            f"got {channels}"
        )
    for name, tensor in (("prediction", prediction), *(("targets", t) for t in targets_MD)):
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{name}: expected floating-point numbers, got {tensor.dtype}")


def _check_weight(name: str, weight: Tensor | None, count: int) -> None:
    if weight is None:
        return
    if weight.shape != (count,) or not weight.dtype.is_floating_point:
        raise ValueError(
            f"{name}: expected floating-point numbers [{count}], "
            f"got {weight.dtype} {tuple(weight.shape)}"
        )


def _numbers(name: str, given: Sequence[float] | None, count: int) -> list[float]:
    if given is None:
        return [1.0 / count] * count
    if len(given) != count:
        raise ValueError(f"{name}: expected {count} values, got {len(given)}")
    return [float(value) for value in given]
