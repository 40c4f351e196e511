"""The encoder: context encoder (visible tokens only) and target encoder (all tokens) are one
architecture.

Shapes: B batch, N grid tokens, K kept tokens, R packed rows (all mask groups behind one another),
D width.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args, overload

from torch import Tensor, nn

from fastjepa.model.block import EPS, Block, LayerNorm
from fastjepa.model.checkpointing import run_block
from fastjepa.model.init import initialise, modality_embedding
from fastjepa.model.positions import rotary_table
from fastjepa.model.segments import packed, segments_of
from fastjepa.model.tokenizer import Tokenizer
from fastjepa.presets import Generation, Rope
from fastjepa_kernels import packed_rows
from fastjepa_kernels.precision import wide


class Shown(NamedTuple):
    """Clips of one shape [B, 3, T, H, W], and the tokens of them that are run: the arguments of
    `Encoder.forward`."""

    clip: Tensor
    index_groups_BK: Sequence[Tensor] | None = None
    clips: Sequence[int] | None = None


class Encoder(nn.Module):
    """Vision transformer with video and image tokenizers and supervised intermediate levels.

    `levels` are 0-based block indices, ascending, the last block last; each has a LayerNorm of
    its own. `generation` "2" is V-JEPA 2: one tokenizer (an image is read as a still clip of one
    tubelet), no modality embeddings, one norm for all levels; its weights need `rope` "tiled" and
    no interpolation. `linear` is the class of the blocks' products (`Float8Linear` for a target).
    Parameter names are those of the released state dict. `origin` says where the weights are from.
    """

    origin = "random weights"

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
        keep_attention: bool = False,
        attention: str = "auto",
        rope: Rope = "interleaved",
        generation: Generation = "2.1",
        linear: type[nn.Linear] = nn.Linear,
    ) -> None:
        super().__init__()
        for key, value, known in (
            ("rope", rope, get_args(Rope)),
            ("generation", generation, get_args(Generation)),
        ):
            if value not in known:
                raise ValueError(f"{key}: expected one of {', '.join(known)}, got {value!r}")
        ascending = list(levels) == sorted(set(levels))
        if not levels or not ascending or levels[0] < 0 or levels[-1] != depth - 1:
            raise ValueError(
                f"levels: expected ascending block indices that end with {depth - 1}, "
                f"got {list(levels)}"
            )
        self.width, self.head_dim, self.levels = width, width // heads, tuple(levels)
        self.patch, self.tubelet, self.interpolate_rope = patch, tubelet, interpolate_rope
        self.checkpointing, self.keep_attention = checkpointing, keep_attention
        self.rope, self.generation = rope, generation
        self.patch_embed = Tokenizer(width, patch, tubelet)
        if generation == "2.1":
            self.patch_embed_img = Tokenizer(width, patch, 1)
            self.img_mod_embed = modality_embedding(width)
            self.video_mod_embed = modality_embedding(width)
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_width, attention=attention, rope=rope, linear=linear)
            for _ in range(depth)
        )
        if generation == "2.1":
            self.norms_block = nn.ModuleList(LayerNorm(width, eps=EPS) for _ in levels)
        else:
            self.norm = LayerNorm(width, eps=EPS)
        initialise(self, self.blocks)  # type: ignore[arg-type]

    def grid(self, clip: Tensor) -> tuple[int, int, int]:
        """Token grid (T', H', W') of a clip [B, 3, T, H, W]; one frame is an image."""
        if clip.ndim != 5 or clip.shape[1] != 3:
            raise ValueError(f"clip: expected [B, 3, T, H, W], got {tuple(clip.shape)}")
        return self._tokenizer(clip).grid(self._as_read(clip))

    def forward(
        self,
        clip: Tensor,
        index_groups_BK: Sequence[Tensor] | None = None,
        *,
        clips: Sequence[int] | None = None,
        levels: Sequence[int] | None = None,
        beside: Sequence[Shown] = (),
    ) -> list[Tensor]:
        """Normalised outputs of the levels, shallowest first, each [R, D] over packed rows.

        clip: [B, 3, T, H, W] normalised RGB; T = 1 is an image. index_groups_BK: for each mask
        group the kept tokens [B, K], which alone are embedded and run; None runs all tokens, rows
        `b * N + token`. clips: the clip that each group starts with, as in `packed_rows`. levels: a
        subset of `self.levels`, all if None. beside: clips of other shapes or modalities, whose
        rows come behind, in the same packed pass. ValueError if a side or a level does not fit.
        """
        wanted = self.levels if levels is None else tuple(levels)
        if not set(wanted) <= set(self.levels):
            raise ValueError(f"levels: expected some of {list(self.levels)}, got {list(wanted)}")
        tokens, tables, shapes = [], [], []
        for shown in (Shown(clip, index_groups_BK, clips), *beside):
            x_RD, own_tables, own_shapes = self._embedded(shown)
            tokens.append(x_RD)
            tables += own_tables
            shapes += own_shapes
        x_RD = packed(tokens)
        segments = segments_of(shapes)
        tables = self.blocks[0].tables(x_RD, tables, segments)  # type: ignore[operator]
        outputs: dict[int, Tensor] = {}
        stream: Sequence[Tensor] = [x_RD]
        for number, block in enumerate(self.blocks[: max(wanted) + 1]):
            stream = run_block(
                block, stream, tables, segments, None, checkpointing=self.checkpointing,
                keep_attention=self.keep_attention, unsummed=number not in wanted,
            )  # fmt: skip
            if number in wanted:
                (x_RD,) = stream
                outputs[number] = self._level(number, x_RD)
        return [outputs[number] for number in wanted]

    @overload
    def features(
        self, clip: Tensor, levels: None = None, *, pool: Literal["mean"] | None = None
    ) -> Tensor: ...
    @overload
    def features(
        self, clip: Tensor, levels: Sequence[int], *, pool: Literal["mean"] | None = None
    ) -> list[Tensor]: ...
    def features(
        self,
        clip: Tensor,
        levels: Sequence[int] | None = None,
        *,
        pool: Literal["mean"] | None = None,
    ) -> Tensor | list[Tensor]:
        """Dense features [B, T', H', W', D] of the last level, or a list with those of `levels`.

        clip: normalised RGB [B, 3, T, H, W], or images [B, 3, H, W]; H and W any multiples of the
        patch. It is taken in the weights' dtype. `pool="mean"` averages over the tokens: [B, D].
        ValueError if a side, a level or `pool` does not fit.
        """
        if pool not in (None, "mean"):
            raise ValueError(f"pool: expected None or 'mean', got {pool!r}")
        if clip.ndim == 4:
            clip = clip.unsqueeze(2)
        clip = clip.to(self.patch_embed.proj.weight.dtype)
        outputs = self(clip, levels=self.levels[-1:] if levels is None else levels)
        grids = [level.view(len(clip), *self.grid(clip), self.width) for level in outputs]
        if pool:
            grids = [grid.mean((1, 2, 3)) for grid in grids]
        return grids[0] if levels is None else grids

    def _embedded(self, shown: Shown) -> tuple[Tensor, list[Tensor], list[tuple[int, int]]]:
        """Tokens [R, D], and the rotary rows, count and length of each of their segments."""
        clip, groups, clips = shown
        grid = self.grid(clip)
        num_tokens = grid[0] * grid[1] * grid[2]
        table = rotary_table(
            grid, self.head_dim, like=clip, patch=self.patch, interpolate=self.interpolate_rope,
            rope=self.rope,
        )  # fmt: skip
        if groups is None:
            return self._tokens(clip, None), [table[None]], [(len(clip), num_tokens)]
        x_RD = self._tokens(clip, packed_rows(groups, num_tokens, clips))
        shapes = [(len(index), index.shape[1]) for index in groups]
        return x_RD, [table[index] for index in groups], shapes

    def _tokens(self, clip: Tensor, rows: Tensor | None) -> Tensor:
        x_RD: Tensor = self._tokenizer(clip)(self._as_read(clip), rows)
        if self.generation == "2":
            return x_RD
        embedding = self.img_mod_embed if clip.shape[2] == 1 else self.video_mod_embed
        return x_RD + embedding[0].to(x_RD.dtype)

    def _tokenizer(self, clip: Tensor) -> Tokenizer:
        image = clip.shape[2] == 1 and self.generation == "2.1"
        return self.patch_embed_img if image else self.patch_embed

    def _as_read(self, clip: Tensor) -> Tensor:
        """The clip as its tokenizer takes it: V-JEPA 2 knows images only as still clips."""
        still = clip.shape[2] == 1 and self.generation == "2"
        return clip.expand(-1, -1, self.tubelet, -1, -1) if still else clip

    def norm_of(self, level: int) -> nn.LayerNorm:
        """The norm of a level's outputs."""
        if self.generation == "2":
            return self.norm
        norm: nn.LayerNorm = self.norms_block[self.levels.index(level)]  # type: ignore[assignment]
        return norm

    def _level(self, number: int, x_RD: Tensor) -> Tensor:
        level: Tensor = self.norm_of(number)(x_RD.to(wide(x_RD.dtype)))
        return level
