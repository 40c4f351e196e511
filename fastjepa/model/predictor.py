"""The predictor: features of every token from those of the visible ones (docs/method.md section 4).

The released code sorts context and mask tokens by position before the blocks and undoes it after.
Positions enter by RoPE on the true token indices and nothing else depends on the order, so here
there is no sort.

Shapes: B batch, K kept tokens, R packed rows, D encoder width, P predictor width, L levels, E
output channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastjepa.model.block import EPS, Block, LayerNorm
from fastjepa.model.checkpointing import run_checkpointed
from fastjepa.model.init import initialise, modality_embedding
from fastjepa.model.positions import rotary_table
from fastjepa.model.segments import SharedRow, segments_of
from fastjepa.presets import Rope
from fastjepa_kernels.precision import wide


class Predictor(nn.Module):
    """Context features and mask tokens to one row a token, with a head for each of the two kinds.

    Parameter names are those of the released state dict. `out_width` is the width of one target
    level (the teacher's when distilling). Only `mask_tokens.0` is used: the others exist in
    released files, untrained. `residual` is the dtype of the residual stream: None is float32 at
    least, as in the released code under autocast.
    """

    def __init__(
        self,
        *,
        encoder_width: int,
        num_levels: int,
        width: int = 384,
        depth: int = 24,
        heads: int = 12,
        mlp_width: int | None = None,
        out_width: int | None = None,
        num_mask_tokens: int = 8,
        patch: int = 16,
        interpolate_rope: bool = True,
        checkpointing: bool = False,
        keep_attention: bool = False,
        attention: str = "auto",
        rope: Rope = "interleaved",
        residual: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.residual = residual
        self.head_dim, self.patch, self.interpolate_rope = width // heads, patch, interpolate_rope
        self.checkpointing, self.keep_attention, self.rope = checkpointing, keep_attention, rope
        if num_levels == 1:
            self.predictor_embed: nn.Module = nn.Linear(encoder_width, width)
        else:
            self.predictor_embed = nn.Sequential(
                nn.Linear(num_levels * encoder_width, encoder_width),
                nn.GELU(),
                nn.Linear(encoder_width, width),
            )
        self.mask_tokens = nn.ParameterList(
            nn.Parameter(torch.zeros(1, 1, width)) for _ in range(num_mask_tokens)
        )
        self.video_mod_embed = modality_embedding(width)
        self.img_mod_embed = modality_embedding(width)
        self.predictor_blocks = nn.ModuleList(
            Block(width, heads, mlp_width or 4 * width, attention=attention, rope=rope)
            for _ in range(depth)
        )
        self.predictor_norm = LayerNorm(width, eps=EPS)
        channels = num_levels * (out_width or encoder_width)
        self.predictor_proj = nn.Linear(width, channels)
        self.predictor_proj_context = nn.Linear(width, channels)
        initialise(self, self.predictor_blocks)  # type: ignore[arg-type]

    def forward(
        self,
        levels_RD: Sequence[Tensor],
        context_groups_BK: Sequence[Tensor],
        predict_groups_BK: Sequence[Tensor],
        grid: tuple[int, int, int],
        *,
        image: bool,
    ) -> tuple[Tensor, Tensor]:
        """Rows before the heads, after `predictor_norm`: (predicted [Rp, P], context [Rc, P]).

        levels_RD: the context encoder's levels over packed context rows. The index groups give
        each group's context and predicted tokens [B, K] on `grid` (T', H', W'); `image` chooses
        the modality embedding.
        """
        context_RP = self.predictor_embed(torch.cat(tuple(levels_RD), dim=-1))
        modality = self.img_mod_embed if image else self.video_mod_embed
        # Every predicted token starts as the same row: the first block takes it once.
        mask_1P = self.mask_tokens[0][0]
        # Float32 at least, in parameters of bfloat16 as under autocast, unless told otherwise.
        stream = self.residual or wide(mask_1P.dtype)
        x_RP = torch.cat((context_RP.to(stream), mask_1P.to(stream))) + modality[0].to(stream)
        segments = segments_of(
            [
                (context.shape[0], context.shape[1] + predict.shape[1])
                for context, predict in zip(context_groups_BK, predict_groups_BK, strict=True)
            ]
        )
        shared = SharedRow(segments, tuple(context.shape[1] for context in context_groups_BK))
        table = rotary_table(
            grid, self.head_dim, like=x_RP, patch=self.patch, interpolate=self.interpolate_rope,
            rope=self.rope,
        )  # fmt: skip
        tables = [
            table[torch.cat(pair, dim=1)]
            for pair in zip(context_groups_BK, predict_groups_BK, strict=True)
        ]
        for number, block in enumerate(self.predictor_blocks):
            inputs = x_RP, tables, segments, None if number else shared
            if self.checkpointing:
                x_RP = run_checkpointed(block, *inputs, keep_attention=self.keep_attention)
            else:
                x_RP = block(*inputs)
        x_RP = self.predictor_norm(x_RP)
        parts = [
            segment.rows(x_RP).split([index.shape[1], segment.length - index.shape[1]], dim=1)
            for segment, index in zip(segments, context_groups_BK, strict=True)
        ]
        context, predicted = (
            torch.cat([part.flatten(0, 1) for part in kind]) for kind in zip(*parts, strict=True)
        )
        return predicted, context

    def predict(
        self,
        levels_RD: Sequence[Tensor],
        context_groups_BK: Sequence[Tensor],
        predict_groups_BK: Sequence[Tensor],
        grid: tuple[int, int, int],
        *,
        image: bool,
    ) -> tuple[Tensor, Tensor]:
        """Features through the heads: (predicted [Rp, E], context [Rc, E]), levels side by side."""
        predicted, context = self(
            levels_RD, context_groups_BK, predict_groups_BK, grid, image=image
        )
        return self.predictor_proj(predicted), self.predictor_proj_context(context)
