"""The encoder: context encoder (visible tokens only) and target encoder (all tokens) are one
architecture.

Shapes: B batch, N grid tokens, K kept tokens, R packed rows (all mask groups behind one another),
D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastjepa.model.block import EPS, Block
from fastjepa.model.init import initialise, modality_embedding
from fastjepa.model.positions import rotary_table
from fastjepa.model.segments import segments_of
from fastjepa.model.tokenizer import Tokenizer
from fastjepa_kernels import packed_rows


class Encoder(nn.Module):
    """Vision transformer with video and image tokenizers and supervised intermediate levels.

    `levels` are 0-based block indices, ascending, the last block last; each has a LayerNorm of
    its own. Parameter names are those of the released state dict.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        mlp_width: int,
        levels: Sequence[int],
        patch: int = 16,
        tubelet: int = 2,
        interpolate_rope: bool = True,
        checkpointing: bool = False,
        attention: str = "auto",
    ) -> None:
        super().__init__()
        ascending = list(levels) == sorted(set(levels))
        if not levels or not ascending or levels[0] < 0 or levels[-1] != depth - 1:
            raise ValueError(
                f"levels: expected ascending block indices that end with {depth - 1}, "
                f"got {list(levels)}"
            )
        self.width, self.head_dim, self.levels = width, width // heads, tuple(levels)
        self.patch, self.tubelet, self.interpolate_rope = patch, tubelet, interpolate_rope
        self.checkpointing = checkpointing
        self.patch_embed = Tokenizer(width, patch, tubelet)
        self.patch_embed_img = Tokenizer(width, patch, 1)
        self.img_mod_embed = modality_embedding(width)
        self.video_mod_embed = modality_embedding(width)
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_width, attention=attention) for _ in range(depth)
        )
        self.norms_block = nn.ModuleList(nn.LayerNorm(width, eps=EPS) for _ in levels)
        initialise(self, self.blocks)  # type: ignore[arg-type]

    def grid(self, clip: Tensor) -> tuple[int, int, int]:
        """Token grid (T', H', W') of a clip [B, 3, T, H, W]; one frame is an image."""
        if clip.ndim != 5 or clip.shape[1] != 3:
            raise ValueError(f"clip: expected [B, 3, T, H, W], got {tuple(clip.shape)}")
        return self._tokenizer(clip).grid(clip)

    def forward(
        self,
        clip: Tensor,
        index_groups_BK: Sequence[Tensor] | None = None,
        *,
        levels: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """Normalised outputs of the levels, shallowest first, each [R, D] over packed rows.

        clip: [B, 3, T, H, W] normalised RGB; T = 1 is an image. index_groups_BK: for each mask
        group the kept tokens [B, K], which alone are embedded and run; None runs all tokens, rows
        `b * N + token`. levels: a subset of `self.levels`, all if None. ValueError if a side or a
        level does not fit.
        """
        wanted = self.levels if levels is None else tuple(levels)
        if not set(wanted) <= set(self.levels):
            raise ValueError(f"levels: expected some of {list(self.levels)}, got {list(wanted)}")
        grid = self.grid(clip)
        num_tokens = grid[0] * grid[1] * grid[2]
        table = rotary_table(
            grid, self.head_dim, like=clip, patch=self.patch, interpolate=self.interpolate_rope
        )
        if index_groups_BK is None:
            rows = None
            segments = segments_of([(len(clip), num_tokens)])
            tables = [table[None]]
        else:
            rows = packed_rows(index_groups_BK, num_tokens)
            segments = segments_of([(index.shape[0], index.shape[1]) for index in index_groups_BK])
            tables = [table[index] for index in index_groups_BK]

        x_RD = self._tokens(clip, rows)
        outputs: dict[int, Tensor] = {}
        for number, block in enumerate(self.blocks[: max(wanted) + 1]):
            if self.checkpointing and torch.is_grad_enabled():
                x_RD = checkpoint(block, x_RD, tables, segments, use_reentrant=False)
            else:
                x_RD = block(x_RD, tables, segments)
            if number in wanted:
                outputs[number] = self._level(number, x_RD)
        return [outputs[number] for number in wanted]

    def features(self, clip: Tensor, levels: Sequence[int] | None = None) -> list[Tensor]:
        """Dense features [B, T', H', W', D] of the given levels; the last level only if None."""
        outputs = self(clip, levels=self.levels[-1:] if levels is None else levels)
        return [level.view(len(clip), *self.grid(clip), self.width) for level in outputs]

    def _tokens(self, clip: Tensor, rows: Tensor | None) -> Tensor:
        x_RD: Tensor = self._tokenizer(clip)(clip, rows)
        embedding = self.img_mod_embed if clip.shape[2] == 1 else self.video_mod_embed
        return x_RD + embedding[0].to(x_RD.dtype)

    def _tokenizer(self, clip: Tensor) -> Tokenizer:
        return self.patch_embed_img if clip.shape[2] == 1 else self.patch_embed

    def _level(self, number: int, x_RD: Tensor) -> Tensor:
        norm = self.norms_block[self.levels.index(number)]
        wide = x_RD if x_RD.dtype == torch.float64 else x_RD.float()
        return F.layer_norm(wide, (self.width,), norm.weight, norm.bias, norm.eps)  # type: ignore[arg-type]
