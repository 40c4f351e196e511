"""The loss path: target levels normalised, gathered, compared; gradients of the prediction or, with
the heads, of their input and weights.

All mask groups, predicted and context tokens: `L_pred + lambda L_ctx` with distance weights.

Shapes: B clips, N grid tokens, K kept tokens, R rows, E = L D channels, L levels, D width, P
predictor width, M = B N target rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastjepa.bench.case import Case, Forward, Work, leaf
from fastjepa.bench.official import Official
from fastjepa.bench.shapes import Shape
from fastjepa_kernels import dense_l1, linear_dense_l1, mask_distance, packed_rows
from fastjepa_kernels.dense_l1 import reference
from fastjepa_kernels.packing import by_group

PREDICTOR_WIDTH = 384
CONTEXT_WEIGHT = 0.5


class _LossCase(Case):
    """Targets and indices of a step. Rows are packed: predicted ones first, group by group."""

    def prepare(self) -> None:
        shape, levels = self.shape, len(self.shape.size.levels)
        self.context_BK, self.predict_BK = shape.index_groups(self.device)
        self.root_BK = [
            mask_distance(context, predict, shape.grid).sqrt()
            for context, predict in zip(self.context_BK, self.predict_BK, strict=True)
        ]
        self.predict_row, self.context_row = (
            packed_rows(groups, shape.num_tokens) for groups in (self.predict_BK, self.context_BK)
        )
        self.predict_sizes = [index.numel() for index in self.predict_BK]
        self.context_sizes = [index.numel() for index in self.context_BK]
        self.context_weight_R = torch.cat([1.0 / root.flatten() for root in self.root_BK])
        self.levels_MD = [
            self.normal(shape.batch * shape.num_tokens, shape.size.width) for _ in range(levels)
        ]
        # The official encoder returns the levels side by side.
        self.levels_BNE = torch.cat(self.levels_MD, dim=1).view(shape.batch, shape.num_tokens, -1)

    def official_loss(
        self, official: Official, predicted: Sequence[Tensor], context: Sequence[Tensor]
    ) -> Tensor:
        """From predictions [B, K, E] of each group."""
        width = self.shape.size.width
        with torch.no_grad():
            parts = self.levels_BNE.split(width, dim=2)
            y_BNE = torch.cat([F.layer_norm(part, (width,)) for part in parts], dim=2)

        def term(
            z: Sequence[Tensor], index: Sequence[Tensor], roots: Sequence[Tensor] | None
        ) -> Any:
            total: Any = 0.0
            for g, y_BKE in enumerate(official.gather(y_BNE, index)):
                difference = torch.abs(z[g] - y_BKE) ** 1.0
                if roots is not None:
                    difference = difference * (1 / roots[g].unsqueeze(2))
                total = total + difference.mean()
            return total / len(index)

        predict = term(predicted, self.predict_BK, None)
        return predict + CONTEXT_WEIGHT * term(context, self.context_BK, self.root_BK)  # type: ignore[no-any-return]

    def autocast(self) -> torch.autocast:
        dtype = self.shape.dtype
        return torch.autocast(self.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


class DenseL1(_LossCase):
    name = "dense_l1"
    measures = "loss and gradient of given predictions"

    @staticmethod
    def work(shape: Shape) -> Work:
        """Reads a prediction, its target row, index and weight; writes the gradient."""
        channels = len(shape.size.levels) * shape.size.width
        row = channels * (2 * shape.dtype.itemsize + 4) + 8 + 4
        return Work(shape.num_rows * row)

    def prepare(self) -> None:
        super().prepare()
        channels = self.levels_BNE.shape[-1]
        self.z_RE = leaf(self.normal(self.shape.num_rows, channels, dtype=self.shape.dtype))
        self.leaves = [self.z_RE]
        self.row_R = torch.cat((self.predict_row, self.context_row))
        self.sizes = [*self.predict_sizes, *self.context_sizes]
        self.weight_R = torch.cat(
            (torch.ones(len(self.predict_row), device=self.device), self.context_weight_R)
        )
        groups = len(self.predict_sizes)
        self.group_weights = [1 / groups] * groups + [CONTEXT_WEIGHT / groups] * groups

    def ours(self) -> list[Tensor]:
        return self._ours(overwrite=False)

    def _ours(self, *, overwrite: bool) -> list[Tensor]:
        total, _ = dense_l1(
            self.z_RE, self.levels_MD, self.row_R, self.sizes, token_weight_R=self.weight_R,
            group_weights=self.group_weights, overwrite_prediction=overwrite,
        )  # fmt: skip
        return [total]

    def arguments(self) -> tuple[Any, ...]:
        weights = self.weight_R, self.group_weights
        return self.z_RE, self.levels_MD, self.row_R, self.sizes, *weights

    @staticmethod
    def formula(*arguments: Any) -> list[Tensor]:
        *where, weight_R, group_weights = arguments
        total, _ = reference.dense_l1(*where, token_weight_R=weight_R, group_weights=group_weights)
        return [total]

    def official(self, official: Official) -> list[Tensor]:
        predicted, context = self.z_RE.split([len(self.predict_row), len(self.context_row)])
        with self.autocast():
            return [
                self.official_loss(
                    official,
                    by_group(predicted, self.predict_BK),
                    by_group(context, self.context_BK),
                )
            ]


class DenseL1Overwriting(DenseL1):
    name = "dense_l1_overwriting"
    measures = "loss, and its gradient in the memory of the predictions"

    def ours(self) -> list[Tensor]:
        return self._ours(overwrite=True)


class LinearDenseL1(_LossCase):
    name = "linear_dense_l1"
    measures = "loss from the predictor's rows, gradients of rows, heads' weights and biases"

    @staticmethod
    def work(shape: Shape) -> Work:
        """Reads rows, targets, indices, weights and both heads; writes the gradients of rows and
        heads. Three products: predictions, and the gradients of rows and weights."""
        channels = len(shape.size.levels) * shape.size.width
        row = 2 * PREDICTOR_WIDTH * shape.dtype.itemsize + 4 * channels + 8
        head = 2 * 4 * channels * (PREDICTOR_WIDTH + 1)
        moved = shape.num_rows * row + shape.context_rows * 4 + 2 * head
        return Work(moved, 6 * shape.num_rows * channels * PREDICTOR_WIDTH)

    def prepare(self) -> None:
        super().prepare()
        channels = self.levels_BNE.shape[-1]
        rows = len(self.predict_row), len(self.context_row)
        self.x_RP = [leaf(self.normal(r, PREDICTOR_WIDTH, dtype=self.shape.dtype)) for r in rows]
        self.heads = [
            (leaf(0.02 * self.normal(channels, PREDICTOR_WIDTH)), leaf(self.normal(channels)))
            for _ in rows
        ]
        self.leaves = [*self.x_RP, *self.heads[0], *self.heads[1]]

    def _terms(self) -> list[tuple[Any, ...]]:
        """Rows, head, target rows, group sizes and token weights of the predictive and context
        terms."""
        where = (self.predict_row, self.predict_sizes), (self.context_row, self.context_sizes)
        weights = None, self.context_weight_R
        return [
            (x, *head, *there, weight)
            for x, head, there, weight in zip(self.x_RP, self.heads, where, weights, strict=True)
        ]

    def ours(self) -> list[Tensor]:
        predict, context = (
            linear_dense_l1(x, weight, bias, self.levels_MD, row, sizes, token_weight_R=w)[0]
            for x, weight, bias, row, sizes, w in self._terms()
        )
        return [predict + CONTEXT_WEIGHT * context]

    def others(self) -> dict[str, Forward]:
        def product_first() -> list[Tensor]:
            predict, context = (
                dense_l1(
                    F.linear(x, weight.to(x.dtype), bias.to(x.dtype)), self.levels_MD, row, sizes,
                    token_weight_R=w, overwrite_prediction=True,
                )[0]
                for x, weight, bias, row, sizes, w in self._terms()
            )  # fmt: skip
            return [predict + CONTEXT_WEIGHT * context]

        return {"product, then dense_l1": product_first}

    def arguments(self) -> tuple[Any, ...]:
        return self.levels_MD, self._terms()

    @staticmethod
    def formula(*arguments: Any) -> list[Tensor]:
        levels_MD, terms = arguments
        predict, context = (
            reference.linear_dense_l1(
                x, weight.to(x.dtype), bias.to(x.dtype), levels_MD, row, sizes, token_weight_R=w
            )[0]
            for x, weight, bias, row, sizes, w in terms
        )
        return [predict + CONTEXT_WEIGHT * context]

    def official(self, official: Official) -> list[Tensor]:
        with self.autocast():
            predicted, context = (
                by_group(F.linear(x, *head), groups)
                for x, head, groups in zip(
                    self.x_RP, self.heads, (self.predict_BK, self.context_BK), strict=True
                )
            )
            return [self.official_loss(official, predicted, context)]
