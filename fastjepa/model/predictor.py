"""The predictor: features of every token from those of the visible ones (docs/method.md section 4).

The released code sorts context and mask tokens by position before the blocks and undoes it after.
Positions enter by RoPE on the true token indices and nothing else depends on the order, so here
there is no sort.

Shapes: B batch, K kept tokens, R packed rows, D encoder width, P predictor width, L levels, E
output channels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastjepa.model.autocast import Linear
from fastjepa.model.block import EPS, Block, LayerNorm
from fastjepa.model.checkpointing import run_block
from fastjepa.model.init import initialise, modality_embedding
from fastjepa.model.positions import rotary_table
from fastjepa.model.segments import SharedRow, num_rows, packed, segments_of
from fastjepa.presets import Rope
from fastjepa_kernels.precision import wide


class Asked(NamedTuple):
    """What is given and what is asked for on one grid: the arguments of `Predictor.forward`."""

    context_groups_BK: Sequence[Tensor]
    predict_groups_BK: Sequence[Tensor]
    grid: tuple[int, int, int]
    image: bool

    @property
    def kept(self) -> tuple[int, ...]:
        """Context tokens of each segment's sequences."""
        return tuple(index.shape[1] for index in self.context_groups_BK)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Count and length of each segment's sequences, context and predicted tokens."""
        pairs = zip(self.context_groups_BK, self.predict_groups_BK, strict=True)
        return [(len(context), context.shape[1] + predict.shape[1]) for context, predict in pairs]


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
            self.predictor_embed: nn.Module = Linear(encoder_width, width)
        else:
            self.predictor_embed = nn.Sequential(
                Linear(num_levels * encoder_width, encoder_width),
                nn.GELU(),
                Linear(encoder_width, width),
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
        self.predictor_proj = Linear(width, channels)
        self.predictor_proj_context = Linear(width, channels)
        initialise(self, self.predictor_blocks)  # type: ignore[arg-type]

    def forward(
        self,
        levels_RD: Sequence[Tensor],
        context_groups_BK: Sequence[Tensor],
        predict_groups_BK: Sequence[Tensor],
        grid: tuple[int, int, int],
        *,
        image: bool,
        beside: Sequence[Asked] = (),
    ) -> tuple[Tensor, Tensor]:
        """Rows before the heads, after `predictor_norm`: (predicted [Rp, P], context [Rc, P]).

        levels_RD: the context encoder's levels over packed context rows. The index groups give
        each group's context and predicted tokens [B, K] on `grid` (T', H', W'); `image` chooses
        the modality embedding. beside: those of other grids or modalities, whose rows come
        behind, in the same packed pass.
        """
        parts = [Asked(context_groups_BK, predict_groups_BK, grid, image), *beside]
        context_RP = self.predictor_embed(torch.cat(tuple(levels_RD), dim=-1))
        segments = segments_of([shape for part in parts for shape in part.shapes])
        kept = [count for part in parts for count in part.kept]
        shared = None
        if len({part.image for part in parts}) == 1:
            # Every predicted token starts as the same row: the first block takes it once.
            shared = SharedRow(segments, tuple(kept))
            x_RP = self._with_mask_token(context_RP, image=image)
        else:
            x_RP = self._assembled(context_RP, parts)
        tables = [table for part in parts for table in self._rotary_rows(part, like=x_RP)]
        first: Block = self.predictor_blocks[0]  # type: ignore[assignment]
        tables = first.tables(x_RP, tables, segments)
        last = len(self.predictor_blocks) - 1
        stream: Sequence[Tensor] = [x_RP]
        for number, block in enumerate(self.predictor_blocks):
            stream = run_block(
                block, stream, tables, segments, None if number else shared,
                checkpointing=self.checkpointing, keep_attention=self.keep_attention,
                unsummed=number < last,
            )  # fmt: skip
        (x_RP,) = stream
        x_RP = self.predictor_norm(x_RP)
        pairs = [
            segment.rows(x_RP).split([count, segment.length - count], dim=1)
            for segment, count in zip(segments, kept, strict=True)
        ]
        context, predicted = (
            packed([rows.flatten(0, 1) for rows in kind]) for kind in zip(*pairs, strict=True)
        )
        return predicted, context

    def _with_mask_token(self, context_RP: Tensor, *, image: bool) -> Tensor:
        """The residual stream's rows of one modality: [R + 1, P], the mask token last."""
        modality = self.img_mod_embed if image else self.video_mod_embed
        mask_1P = self.mask_tokens[0][0]
        # Float32 at least, in parameters of bfloat16 as under autocast, unless told otherwise.
        stream = self.residual or wide(mask_1P.dtype)
        return torch.cat((context_RP.to(stream), mask_1P.to(stream))) + modality[0].to(stream)

    def _assembled(self, context_RP: Tensor, parts: Sequence[Asked]) -> Tensor:
        """Every row of every sequence of several modalities, as the blocks take them."""
        rows = [num_rows(part.context_groups_BK) for part in parts]
        return torch.cat(
            [
                SharedRow(segments_of(part.shapes), part.kept).spread(
                    self._with_mask_token(own_RP, image=part.image)
                )
                for part, own_RP in zip(parts, context_RP.split(rows), strict=True)
            ]
        )

    def _rotary_rows(self, part: Asked, *, like: Tensor) -> list[Tensor]:
        table = rotary_table(
            part.grid, self.head_dim, like=like, patch=self.patch,
            interpolate=self.interpolate_rope, rope=self.rope,
        )  # fmt: skip
        pairs = zip(part.context_groups_BK, part.predict_groups_BK, strict=True)
        return [table[torch.cat(pair, dim=1)] for pair in pairs]

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
