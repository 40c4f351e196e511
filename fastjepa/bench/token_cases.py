"""Ops on token indices: distances of context tokens, visible rows picked, sequences put together.

Shapes: B clips, N grid tokens, K kept tokens, S = Kc + Kp tokens of a sequence, R rows of all clips
and groups, D encoder width, P predictor width.
"""

from typing import Any

import torch
from torch import Tensor

from fastjepa.bench.case import Case, Work, leaf
from fastjepa.bench.loss_cases import PREDICTOR_WIDTH
from fastjepa.bench.official import Official
from fastjepa.bench.shapes import Shape
from fastjepa_kernels import assemble_tokens, gather_tokens, mask_distance
from fastjepa_kernels.mask_distance.reference import mask_distance as every_pair
from fastjepa_kernels.packing import by_group
from fastjepa_kernels.tokens import reference

_INDEX, _FLOAT = 8, 4


class MaskDistance(Case):
    name = "mask_distance"
    measures = "distance of every context token to the nearest predicted one"

    @staticmethod
    def work(shape: Shape) -> Work:
        """Reads all indices, writes a distance for each context token."""
        return Work(_INDEX * shape.num_rows + _FLOAT * shape.context_rows)

    def prepare(self) -> None:
        self.context_BK, self.predict_BK = self.shape.index_groups(self.device)

    def ours(self) -> list[Tensor]:
        pairs = zip(self.context_BK, self.predict_BK, strict=True)
        return [mask_distance(context, predict, self.shape.grid) for context, predict in pairs]

    def arguments(self) -> tuple[Any, ...]:
        return self.context_BK, self.predict_BK, self.shape.grid

    @staticmethod
    def formula(*arguments: Any) -> list[Tensor]:
        context_BK, predict_BK, grid = arguments
        pairs = zip(context_BK, predict_BK, strict=True)
        return [every_pair(context, predict, grid) for context, predict in pairs]

    def official(self, official: Official) -> list[Tensor]:
        return official.mask_distance(self.predict_BK, self.context_BK, self.shape.grid[1])

    def comparable(self, way: str, outputs: list[Tensor]) -> Tensor:
        # The official function returns roots of distances.
        power = 2 if way == "official" else 1
        return super().comparable(way, [output.float() ** power for output in outputs])


class GatherTokens(Case):
    name = "gather_tokens"
    measures = "visible rows plus modality embedding, all groups; forward and backward"

    @staticmethod
    def work(shape: Shape) -> Work:
        """Reads and writes each visible row; backward reads their gradients and writes that of all
        tokens."""
        element, width = shape.dtype.itemsize, shape.size.width
        rows = 3 * shape.context_rows + shape.batch * shape.num_tokens
        return Work(rows * width * element + 2 * shape.context_rows * _INDEX + 2 * width * _FLOAT)

    def prepare(self) -> None:
        shape, width = self.shape, self.shape.size.width
        self.context_BK, _ = shape.index_groups(self.device)
        self.tokens_BND = leaf(self.normal(shape.batch, shape.num_tokens, width, dtype=shape.dtype))
        self.modality_D = leaf(self.normal(width))
        self.leaves = [self.tokens_BND, self.modality_D]
        self.upstream = self.normal(shape.context_rows * width, dtype=shape.dtype)

    def ours(self) -> list[Tensor]:
        return [gather_tokens(self.tokens_BND, self.context_BK, add=self.modality_D)]

    def arguments(self) -> tuple[Any, ...]:
        return self.tokens_BND, self.context_BK, self.modality_D

    @staticmethod
    def formula(*arguments: Any) -> list[Tensor]:
        tokens_BND, context_BK, modality_D = arguments
        return [reference.gather_tokens(tokens_BND, index, modality_D) for index in context_BK]

    def official(self, official: Official) -> list[Tensor]:
        clips, width = self.shape.batch, self.shape.size.width
        picked = []
        for index in self.context_BK:
            added_B1D = self.modality_D.view(1, 1, width).repeat(clips, 1, 1)
            all_BND = (self.tokens_BND + added_B1D).to(self.shape.dtype)
            picked += official.gather(all_BND, [index])
        return picked


class AssembleTokens(Case):
    name = "assemble_tokens"
    measures = "the predictor's sequences of all groups; forward and backward"

    @staticmethod
    def work(shape: Shape) -> Work:
        """Reads the context rows and writes whole sequences; backward the other way round.
        Sequences are float32, as the mask token is."""
        context = shape.context_rows * shape.dtype.itemsize
        rows = 2 * (context + shape.num_rows * _FLOAT) * PREDICTOR_WIDTH
        return Work(rows + _INDEX * shape.num_rows + 4 * PREDICTOR_WIDTH * _FLOAT)

    def prepare(self) -> None:
        shape = self.shape
        self.context_BK, self.predict_BK = shape.index_groups(self.device)
        self.context_RP = leaf(self.normal(shape.context_rows, PREDICTOR_WIDTH, dtype=shape.dtype))
        self.mask_P = leaf(self.normal(PREDICTOR_WIDTH))
        self.modality_P = leaf(self.normal(PREDICTOR_WIDTH))
        self.leaves = [self.context_RP, self.mask_P, self.modality_P]
        self.upstream = self.normal(shape.num_rows * PREDICTOR_WIDTH)

    def ours(self) -> list[Tensor]:
        assembled = assemble_tokens(
            self.context_RP, self.mask_P, self.context_BK, self.predict_BK, add=self.modality_P
        )
        return [assembled.tokens]

    def arguments(self) -> tuple[Any, ...]:
        context_BKP = by_group(self.context_RP, self.context_BK)
        return context_BKP, self.mask_P, self.context_BK, self.predict_BK, self.modality_P

    @staticmethod
    def formula(*arguments: Any) -> list[Tensor]:
        context, mask_P, context_BK, predict_BK, modality_P = arguments
        return [
            reference.assemble_tokens(rows, mask_P, seen, hidden, modality_P)[0]
            for rows, seen, hidden in zip(context, context_BK, predict_BK, strict=True)
        ]

    def official(self, official: Official) -> list[Tensor]:
        clips = self.shape.batch
        sequences = []
        for rows, seen, hidden in zip(
            by_group(self.context_RP, self.context_BK),
            self.context_BK,
            self.predict_BK,
            strict=True,
        ):
            everywhere = self.mask_P.view(1, 1, -1).repeat(clips, self.shape.num_tokens, 1)
            x_BSP = torch.cat((rows, *official.gather(everywhere, [hidden])), dim=1)
            order_BS = torch.cat((seen, hidden), dim=1).argsort(dim=1)
            x_BSP = torch.stack([x[order] for x, order in zip(x_BSP, order_BS, strict=True)])
            sequences.append(x_BSP + self.modality_P.view(1, 1, -1).repeat(clips, 1, 1))
        return sequences

    def comparable(self, way: str, outputs: list[Tensor]) -> Tensor:
        """In token order, as the official sequences are."""
        flat = super().comparable(way, outputs)
        if way == "official":
            return flat
        sorted_rows, start = [], 0
        rows = flat.view(-1, PREDICTOR_WIDTH)
        for seen, hidden in zip(self.context_BK, self.predict_BK, strict=True):
            for index in torch.cat((seen, hidden), dim=1):
                sorted_rows.append(rows[start : start + len(index)][index.argsort()])
                start += len(index)
        return torch.cat(sorted_rows).flatten()
