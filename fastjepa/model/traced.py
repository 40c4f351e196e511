"""The encoder in plain operators with symbolic sizes: what `torch.export` and ONNX can take along.

The weights are the encoder's own; the arithmetic is written out once more because the fast one
hides in ops and tables that a graph cannot hold.

Shapes: B batch, N grid tokens, H heads, C head channels, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastjepa.model.block import Block
from fastjepa.model.encoder import Encoder
from fastjepa.model.positions import PRETRAINING_PX, turn_tiled
from fastjepa_kernels.rope3d import reference


class TracedEncoder(nn.Module):
    """Clips [B, 3, T, H, W] to one [B, T', H', W', D] for each level, at any size that divides.

    A graph has one tokenizer: `image` takes the one for images, whose T is 1.
    """

    def __init__(self, encoder: Encoder, levels: Sequence[int], *, image: bool = False) -> None:
        super().__init__()
        if not levels or not set(levels) <= set(encoder.levels):
            raise ValueError(f"levels: expected some of {list(encoder.levels)}, got {list(levels)}")
        self.encoder, self.levels = encoder, tuple(levels)
        self.image = image

    def forward(self, clip: Tensor) -> tuple[Tensor, ...]:
        """Normalised float clips to normed features."""
        encoder = self.encoder
        own_tokenizer = self.image and encoder.generation == "2.1"
        if self.image and not own_tokenizer:
            clip = clip.expand(-1, -1, encoder.tubelet, -1, -1)
        proj = (encoder.patch_embed_img if own_tokenizer else encoder.patch_embed).proj
        x_BDTHW = F.conv3d(clip, proj.weight, proj.bias, proj.stride)
        grid = x_BDTHW.shape[2:]
        x_BND = x_BDTHW.flatten(2).transpose(1, 2)
        if encoder.generation == "2.1":
            x_BND = x_BND + (encoder.img_mod_embed if self.image else encoder.video_mod_embed)
        table = self._table(grid, x_BND)
        outputs: dict[int, Tensor] = {}
        for number, block in enumerate(encoder.blocks[: max(self.levels) + 1]):
            x_BND = self._block(block, x_BND, table)  # type: ignore[arg-type]
            if number in self.levels:
                outputs[number] = encoder.norm_of(number)(x_BND).unflatten(1, grid)
        return tuple(outputs[level] for level in self.levels)

    def _block(self, block: Block, x_BND: Tensor, table: Tensor) -> Tensor:
        attn, mlp = block.attn, block.mlp
        qkv_BN3HC = attn.qkv(block.norm1(x_BND)).unflatten(-1, (3, attn.heads, -1))
        if self.encoder.rope == "tiled":
            qkv_BN3HC = turn_tiled(qkv_BN3HC, table)
        else:
            qkv_BN3HC = reference.rope3d(qkv_BN3HC, table)
        q, k, v = qkv_BN3HC.permute(2, 0, 3, 1, 4).unbind(0)
        mixed_BND = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x_BND = x_BND + attn.proj(mixed_BND)
        out_BND: Tensor = x_BND + mlp.fc2(F.gelu(mlp.fc1(block.norm2(x_BND))))
        return out_BND

    def _table(self, grid: Sequence[int], like: Tensor) -> Tensor:
        """`rotary_table` of a grid whose sides are symbols. An axis of one token has position 0."""
        encoder = self.encoder
        pairs = (encoder.head_dim // 3) // 2
        frequency = 10_000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
        frequency = frequency.to(like)
        rest = encoder.head_dim // 2 - 3 * pairs
        span = PRETRAINING_PX // encoder.patch - 1
        axes = []
        for axis, count in enumerate(grid):
            place = torch.arange(count, device=like.device).to(like.dtype)
            if encoder.interpolate_rope and axis:
                # No symbol in a branch: the largest position is the count less one.
                place = place * span / place[-1].clamp(min=1.0)
            angle = place[:, None] * frequency
            if encoder.rope == "tiled":
                angle = torch.cat((angle, angle), dim=-1)
            shape = [count if a == axis else 1 for a in range(3)]
            axes.append(angle.view(*shape, angle.shape[-1]).expand(*grid, -1))
        still = like.new_zeros(1, 1, 1, 2 * rest if encoder.rope == "tiled" else rest)
        angle = torch.cat([*axes, still.expand(*grid, -1)], dim=-1).flatten(0, 2)
        return torch.stack((angle.cos(), angle.sin()), dim=-1)
