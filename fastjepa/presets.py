"""The encoder zoo as plain numbers: name to width, depth, heads, MLP width and supervised levels.

Imports nothing, so that the recipe can be resolved from it. Sizes: docs/method.md section 2 of
the paper's released code (the level 37 of ViT-G is the released code's, where the paper's text
has 36).
"""

from dataclasses import dataclass
from typing import Literal

# How the frequencies of an axis lie on its channels: V-JEPA 2.1 turns each pair of neighbours by
# one of them (w0 w0 w1 w1 ...), V-JEPA 2 repeats the whole list (w0 w1 ... w0 w1 ...).
Rope = Literal["interleaved", "tiled"]

# What an encoder is built of. "2.1": a tokenizer and an embedding for each modality, a norm for
# each level. "2": one tokenizer, one norm for all levels.
Generation = Literal["2.1", "2"]


@dataclass(frozen=True)
class EncoderSize:
    """Shape of one ViT: `levels` are 0-based indices of the blocks whose outputs are supervised."""

    width: int
    depth: int
    heads: int
    mlp_width: int
    levels: tuple[int, ...]


PRESETS: dict[str, EncoderSize] = {
    "vit_tiny": EncoderSize(192, 12, 3, 768, (2, 5, 8, 11)),
    "vit_small": EncoderSize(384, 12, 6, 1536, (2, 5, 8, 11)),
    "vit_base": EncoderSize(768, 12, 12, 3072, (2, 5, 8, 11)),
    "vit_large": EncoderSize(1024, 24, 16, 4096, (5, 11, 17, 23)),
    "vit_huge": EncoderSize(1280, 32, 16, 5120, (7, 15, 23, 31)),
    "vit_giant": EncoderSize(1408, 40, 22, 6144, (9, 19, 29, 39)),
    "vit_gigantic": EncoderSize(1664, 48, 26, 8192, (11, 23, 37, 47)),
}


def default_levels(depth: int) -> tuple[int, ...]:
    """Four supervised blocks of a ViT of `depth` blocks, at its quarters; the released choice
    where one exists.

    Depths below four supervise every block.
    """
    for size in PRESETS.values():
        if size.depth == depth:
            return size.levels
    count = min(4, depth)
    return tuple(round((i + 1) * depth / count) - 1 for i in range(count))
