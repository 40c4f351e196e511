"""The predictor's attention: all clips and mask groups of a step, each sequence on itself.

Shapes: R rows of all clips and groups, B clips, K tokens of a sequence, H heads, C head channels.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fastjepa.bench.case import Case, Forward, Work, leaf
from fastjepa.bench.loss_cases import PREDICTOR_WIDTH
from fastjepa.bench.official import Official
from fastjepa.bench.shapes import Shape
from fastjepa.model.attention import backend_named
from fastjepa.model.attention_backends import Run, by_segment, sequence_starts
from fastjepa.model.segments import Segment, segments_of
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
        self.segments = segments_of(_sequences(self.shape))
        self.starts = sequence_starts(tuple(self.segments), self.device)
        self.longest = max(segment.length for segment in self.segments)
        packed = self.shape.num_rows, 3, HEADS, PREDICTOR_WIDTH // HEADS
        self.qkv_R3HC = leaf(self.normal(*packed, dtype=self.shape.dtype))
        self.leaves = [self.qkv_R3HC]
        self.upstream = self.normal(self.qkv_R3HC[:, 0].numel(), dtype=self.shape.dtype)

    def ours(self) -> list[Tensor]:
        q, k, v = self.qkv_R3HC.unbind(1)
        return [packed_attention(q, k, v, self.starts, self.longest)]

    def arguments(self) -> tuple[Any, ...]:
        return self.qkv_R3HC, self.segments

    @staticmethod
    def formula(*arguments: Any) -> list[Tensor]:
        return _run(backend_named("math").run, *arguments)

    def official(self, official: Official) -> list[Tensor]:
        return _run(by_segment(F.scaled_dot_product_attention), *self.arguments())

    def others(self) -> dict[str, Forward]:
        varlen = backend_named("varlen")
        if varlen.refusal(self.device, self.shape.dtype, PREDICTOR_WIDTH // HEADS) is not None:
            return {}
        return {"varlen_attn": lambda: _run(varlen.run, *self.arguments())}


def _run(attend: Run, qkv_R3HC: Tensor, segments: Sequence[Segment]) -> list[Tensor]:
    q, k, v = qkv_R3HC.unbind(1)
    return [attend(q, k, v, segments)]


def _sequences(shape: Shape) -> list[tuple[int, int]]:
    """Count and length of each group's sequences: context and predicted tokens of a clip."""
    masks = shape.masks
    return [
        (len(context), context.shape[1] + predict.shape[1])
        for context, predict in zip(masks.context, masks.predict, strict=True)
    ]
