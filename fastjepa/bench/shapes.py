"""The shapes ops are measured at: an encoder, a clip, a batch, and the mask groups of one step.

    named(["vitl-256px-16f-b24", "cpu"])  # shapes, and sets of them, by name

Batches are one GPU's in the released recipes. Masks are those of seed 0, step 0, so a shape's
token counts never change.

Shapes: B clips, N grid tokens, K kept tokens, R rows of all clips and groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache

import torch
from torch import Tensor

from fastjepa.masking.batch import MaskMaker, Masks
from fastjepa.masking.blocks import Blocks
from fastjepa.presets import PRESETS, EncoderSize

_PATCH, _TUBELET = 16, 2
# The released video groups.
VIDEO_GROUPS = (
    Blocks(num_blocks=8, spatial_scale=(0.15, 0.15)),
    Blocks(num_blocks=2, spatial_scale=(0.7, 0.7)),
)


@dataclass(frozen=True)
class Shape:
    """One micro-batch of videos. `dtype` is that of activations; targets and averages are
    float32."""

    name: str
    model: str
    pixels: int
    frames: int
    batch: int
    dtype: torch.dtype

    @property
    def size(self) -> EncoderSize:
        return PRESETS[self.model]

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.frames // _TUBELET, self.pixels // _PATCH, self.pixels // _PATCH

    @property
    def num_tokens(self) -> int:
        frames, height, width = self.grid
        return frames * height * width

    @property
    def masks(self) -> Masks:
        """Index sets of each group, on the CPU."""
        return _masks(self.grid, self.batch)

    def index_groups(self, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        """(context, predict): [B, K] int64 of each group."""
        masks = self.masks.to(device)
        return list(masks.context), list(masks.predict)

    @property
    def context_rows(self) -> int:
        return sum(index.numel() for index in self.masks.context)

    @property
    def predict_rows(self) -> int:
        return sum(index.numel() for index in self.masks.predict)

    @property
    def num_rows(self) -> int:
        return self.context_rows + self.predict_rows


@lru_cache(maxsize=16)
def _masks(grid: tuple[int, int, int], batch: int) -> Masks:
    return MaskMaker(VIDEO_GROUPS, grid, batch, seed=0, weigh=False)(0)


def _shape(short: str, pixels: int, frames: int, batch: int, dtype: torch.dtype) -> Shape:
    models = {
        "vitt": "vit_tiny", "vits": "vit_small", "vitl": "vit_large", "vitg": "vit_giant",
        "vitG": "vit_gigantic",
    }  # fmt: skip
    name = f"{short}-{pixels}px-{frames}f-b{batch}"
    return Shape(name, models[short], pixels, frames, batch, dtype)


TINY = _shape("vitt", 64, 4, 2, torch.float32)
SETS: dict[str, tuple[Shape, ...]] = {
    "gpu": (
        _shape("vitl", 256, 16, 24, torch.bfloat16),
        _shape("vitg", 256, 16, 24, torch.bfloat16),
        _shape("vitG", 256, 16, 12, torch.bfloat16),
        _shape("vitl", 384, 64, 6, torch.bfloat16),
    ),
    "cpu": (
        _shape("vits", 256, 16, 1, torch.float32),
        _shape("vits", 256, 16, 8, torch.float32),
        _shape("vitl", 256, 16, 2, torch.float32),
    ),
    "tiny": (TINY,),
}
SHAPES: dict[str, Shape] = {shape.name: shape for shapes in SETS.values() for shape in shapes}


def named(names: Sequence[str]) -> list[Shape]:
    """Shapes by name or by set, each once. Raises ValueError for a name that is neither."""
    found: dict[str, Shape] = {}
    for name in names:
        if name not in SHAPES and name not in SETS:
            raise ValueError(f"--shape {name}: {expected(name, [*SETS, *SHAPES])}")
        for shape in SETS.get(name) or (SHAPES[name],):
            found[shape.name] = shape
    return list(found.values())


def expected(name: str, known: Sequence[str]) -> str:
    """What fits instead of an unknown name, the nearest first."""
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{hint}expected one of {', '.join(known)}"
