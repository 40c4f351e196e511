"""The predictor's attention: all clips and mask groups of a step, each sequence on itself.

Shapes: R rows of all clips and groups, B clips, K tokens of a sequence, H heads, C head channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastjepa.bench.case import Case, Forward, Work, leaf
from fastjepa.bench.loss_cases import PREDICTOR_WIDTH
from fastjepa.bench.official import Official
from fastjepa.bench.shapes import Shape
from fastjepa_kernels import packed_attention

HEADS = 12


class PackedAttention(Case):
    name = "packed_attention"
    measures = "attention of a block of the predictor, all groups; forward and backward"

    @staticmethod
    def work(shape: Shape) -> Work:
        """Reads q, k, v and writes the output; reads all four and the output's gradient, and writes
        three gradients. Two products forward, five backward."""
        squares = sum(count * length**2 for count, length in _sequences(shape))
        moved = 12 * shape.num_rows * PREDICTOR_WIDTH * shape.dtype.itemsize
        return Work(moved, 14 * squares * PREDICTOR_WIDTH)

    def prepare(self) -> None:
        self.sequences = _sequences(self.shape)
        lengths = [length for count, length in self.sequences for _ in range(count)]
        self.starts = torch.tensor([0, *lengths]).cumsum(0).int().to(self.device)
        self.longest = max(lengths)
        packed = self.shape.num_rows, 3, HEADS, PREDICTOR_WIDTH // HEADS
        self.qkv_R3HC = leaf(self.normal(*packed, dtype=self.shape.dtype))
        self.leaves = [self.qkv_R3HC]
        self.upstream = self.normal(self.qkv_R3HC[:, 0].numel(), dtype=self.shape.dtype)

    def ours(self) -> list[Tensor]:
        q, k, v = self.qkv_R3HC.unbind(1)
        return [packed_attention(q, k, v, self.starts, self.longest)]

    def arguments(self) -> tuple[Any, ...]:
        return self.qkv_R3HC, self.sequences

    @staticmethod
    def formula(*arguments: Any) -> list[Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scores_BHKK = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            out: Tensor = scores_BHKK.softmax(-1) @ v
            return out

        return [_by_group(attend, *arguments)]

    def official(self, official: Official) -> list[Tensor]:
        return [_by_group(F.scaled_dot_product_attention, *self.arguments())]

    def others(self) -> dict[str, Forward]:
        if self.device.type != "cuda":
            return {}
        from torch.nn.attention.varlen import varlen_attn

        def varlen() -> list[Tensor]:
            starts, longest = self.starts, self.longest
            q, k, v = self.qkv_R3HC.unbind(1)
            out = varlen_attn(q, k, v, starts, starts, longest, longest)
            assert isinstance(out, Tensor)
            return [out]

        return {"varlen_attn": varlen} if self.shape.dtype.itemsize == 2 else {}


def _sequences(shape: Shape) -> list[tuple[int, int]]:
    """Count and length of each group's sequences: context and predicted tokens of a clip."""
    masks = shape.masks
    return [
        (len(context), context.shape[1] + predict.shape[1])
        for context, predict in zip(masks.context, masks.predict, strict=True)
    ]


def _by_group(attend: Any, qkv_R3HC: Tensor, sequences: Sequence[tuple[int, int]]) -> Tensor:
    groups = qkv_R3HC.split([count * length for count, length in sequences])
    parts = []
    for group, (count, length) in zip(groups, sequences, strict=True):
        q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in group.unbind(1))
        parts.append(attend(q, k, v).transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)
