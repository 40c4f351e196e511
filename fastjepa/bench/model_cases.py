"""Ops of the blocks and the update: rotary positions in trained and in target passes, the EMA.

Shapes: B clips, N grid tokens, K kept tokens, R rows of all clips and groups, H heads, C head
channels, D width.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastjepa.bench.case import Case, Work, leaf
from fastjepa.bench.official import Official, places
from fastjepa.bench.shapes import Shape
from fastjepa.model import build_encoder
from fastjepa.model.positions import PRETRAINING_PX, rotary_table
from fastjepa_kernels import ema_update, rope3d, rope3d_
from fastjepa_kernels.ema import reference as ema_reference
from fastjepa_kernels.rope3d.reference import rotate

MOMENTUM = 0.99925
_PRETRAINING_SIDE = PRETRAINING_PX // 16


class _RopeCase(Case):
    def official_rotation(
        self, official: Official, q: Tensor, k: Tensor, token: Tensor
    ) -> tuple[Tensor, Tensor]:
        """q and k [B, H, N, C], axis by axis; `token` [N], or repeated over heads, [B, H, N]."""
        _, height, width = self.shape.grid
        axes = list(places(token, height, width))
        for number, side in ((1, height), (2, width)):
            axes[number] = axes[number] * (_PRETRAINING_SIDE - 1) / (side - 1)
        turning = 2 * (q.shape[-1] // 3 // 2)
        dtype = self.shape.dtype
        with torch.autocast(self.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            turned = []
            for x in (q, k):
                *parts, rest = x.split([turning] * 3 + [x.shape[-1] - 3 * turning], dim=-1)
                parts = [official.rotate(p, place) for p, place in zip(parts, axes, strict=True)]
                turned.append(torch.cat([*parts, rest], dim=-1))
        return turned[0], turned[1]


class Rope3d(_RopeCase):
    name = "rope3d"
    measures = "q and k of a context block, all groups, token indices; forward and backward"

    @staticmethod
    def work(shape: Shape) -> Work:
        """Reads and writes packed qkv rows, forward and backward, with an index a row and the
        table once each."""
        row = 3 * shape.size.width * shape.dtype.itemsize
        moved = 2 * (2 * row * shape.context_rows + 8 * shape.context_rows + _table_bytes(shape))
        return Work(moved)

    def prepare(self) -> None:
        size, rows = self.shape.size, self.shape.context_rows
        channels = size.width // size.heads
        self.context_BK, _ = self.shape.index_groups(self.device)
        self.index_R = torch.cat([index.flatten() for index in self.context_BK])
        self.qkv_R3HC = leaf(self.normal(rows, 3, size.heads, channels, dtype=self.shape.dtype))
        self.table_NC2 = rotary_table(self.shape.grid, channels, like=self.index_R)
        self.leaves = [self.qkv_R3HC]
        self.upstream = self.normal(self.qkv_R3HC.numel(), dtype=self.shape.dtype)

    def ours(self) -> list[Tensor]:
        return [rope3d(self.qkv_R3HC, self.table_NC2, self.index_R)]

    def arguments(self) -> tuple[Any, ...]:
        return self.qkv_R3HC, self.table_NC2, self.index_R

    @staticmethod
    def formula(*arguments: Any) -> list[Tensor]:
        qkv_R3HC, table_NC2, index_R = arguments
        table = table_NC2[index_R][:, None, None]
        return [torch.cat((rotate(qkv_R3HC[:, :2], table), qkv_R3HC[:, 2:]), dim=1)]

    def official(self, official: Official) -> list[Tensor]:
        outputs: list[Tensor] = []
        parts = self.qkv_R3HC.split([index.numel() for index in self.context_BK])
        for part, index in zip(parts, self.context_BK, strict=True):
            clips, kept = index.shape
            packed = part.view(clips, kept, *part.shape[1:]).permute(2, 0, 3, 1, 4)
            token = index[:, None].repeat(1, self.shape.size.heads, 1)
            outputs += [*self.official_rotation(official, packed[0], packed[1], token), packed[2]]
        return outputs

    def comparable(self, way: str, outputs: list[Tensor]) -> Tensor:
        if way == "official":
            # q, k and v [B, H, K, C] of each group to packed rows.
            triples = [outputs[i : i + 3] for i in range(0, len(outputs), 3)]
            outputs = [torch.stack(t, dim=2).permute(0, 3, 2, 1, 4) for t in triples]
        return super().comparable(way, outputs)


class Rope3dInPlace(_RopeCase):
    name = "rope3d_"
    measures = "q and k of a target block, in place, all tokens; no gradient"

    @staticmethod
    def work(shape: Shape) -> Work:
        """Reads and writes q and k, and reads the table."""
        rows = shape.batch * shape.num_tokens
        return Work(2 * rows * 2 * shape.size.width * shape.dtype.itemsize + _table_bytes(shape))

    def prepare(self) -> None:
        shape, size = self.shape, self.shape.size
        channels = size.width // size.heads
        sizes = shape.batch, shape.num_tokens, 3, size.heads, channels
        self.qkv_BN3HC = self.normal(*sizes, dtype=shape.dtype)
        self.table_NC2 = rotary_table(shape.grid, channels, like=self.qkv_BN3HC)

    def ours(self) -> list[Tensor]:
        return [rope3d_(self.qkv_BN3HC, self.table_NC2)]

    def arguments(self) -> tuple[Any, ...]:
        return self.qkv_BN3HC, self.table_NC2

    @staticmethod
    def formula(*arguments: Any) -> list[Tensor]:
        qkv_BN3HC, table_NC2 = arguments
        qk = rotate(qkv_BN3HC[:, :, :2], table_NC2[:, None, None])
        qkv_BN3HC[:, :, :2].copy_(qk)
        return [qkv_BN3HC]

    def official(self, official: Official) -> list[Tensor]:
        packed = self.qkv_BN3HC.permute(2, 0, 3, 1, 4)
        token = torch.arange(self.shape.num_tokens, device=self.device)
        return [*self.official_rotation(official, packed[0], packed[1], token), packed[2]]

    def comparable(self, way: str, outputs: list[Tensor]) -> Tensor:
        if way == "official":
            outputs = [torch.stack(outputs, dim=2).permute(0, 3, 2, 1, 4)]
        return super().comparable(way, outputs)


class EmaUpdate(Case):
    name = "ema_update"
    measures = "all weights of the encoder, in place"

    @staticmethod
    def work(shape: Shape) -> Work:
        """Reads target and source, writes the target."""
        return Work(3 * 4 * sum(size.numel() for size in _weights(shape.model)))

    def prepare(self) -> None:
        self.targets, self.sources = (
            [self.normal(*size) for size in _weights(self.shape.model)] for _ in range(2)
        )

    def ours(self) -> list[Tensor]:
        ema_update(self.targets, self.sources, MOMENTUM)
        return self.targets

    def arguments(self) -> tuple[Any, ...]:
        return self.targets, self.sources

    @staticmethod
    def formula(*arguments: Any) -> list[Tensor]:
        targets, sources = arguments
        ema_reference.ema_update(targets, sources, MOMENTUM)
        return list(targets)

    def official(self, official: Official) -> list[Tensor]:
        torch._foreach_mul_(self.targets, MOMENTUM)
        torch._foreach_add_(self.targets, self.sources, alpha=1 - MOMENTUM)
        return self.targets


def _table_bytes(shape: Shape) -> int:
    return 4 * shape.num_tokens * (shape.size.width // shape.size.heads)


@lru_cache(maxsize=8)
def _weights(model: str) -> list[torch.Size]:
    with torch.device("meta"):
        return [weight.shape for weight in build_encoder(model).parameters()]
