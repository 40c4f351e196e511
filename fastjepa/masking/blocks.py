"""Sizes and places of mask blocks: pure functions of (seed, step, rank, sample), vectorised over
a batch.

Random numbers come from Philox, a counter-based generator: a sample's blocks depend on its key
alone, not on how many samples, workers or restarts came before.

Shapes: B batch, S blocks, (T, H, W) token grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

Grid = tuple[int, int, int]

# Streams of random numbers, so that sizes and places never share a counter.
_SIZES, _PLACES = 0, 1
_MAX_REDRAWS = 1000


@dataclass(frozen=True)
class Blocks:
    """How the blocks of a mask group are drawn; the fields are those of the recipe's mask
    groups."""

    num_blocks: int
    spatial_scale: tuple[float, float]
    temporal_scale: tuple[float, float] = (1.0, 1.0)
    aspect_ratio: tuple[float, float] = (0.75, 1.5)
    max_temporal_keep: float = 1.0
    max_keep: int | None = None
    full_complement: bool = False
    pred_full_complement: bool = False
    inv_block: bool = False


def _generator(seed: int, kind: int, stream: int, *counter: int) -> np.random.Generator:
    # The lowest counter word is Philox's own; three words of 64 bits are left to name the draw.
    words = np.zeros(4, dtype=np.uint64)
    words[1 : 1 + len(counter)] = counter
    return np.random.Generator(np.random.Philox(key=[seed, kind + 2 * stream], counter=words))


def block_size(
    blocks: Blocks, grid: Grid, *, seed: int, step: int, group: int, stream: int = 0
) -> Grid:
    """The one block size (t, h, w) of a batch, the same on every rank.

    Raises ValueError if the drawn block has no tokens (a scale too small for the grid).
    """
    u_t, u_s, u_a = _generator(seed, _SIZES, stream, step, group).random(3)
    t = max(1, int(grid[0] * _between(blocks.temporal_scale, u_t)))
    keep = int(grid[1] * grid[2] * _between(blocks.spatial_scale, u_s))
    aspect = _between(blocks.aspect_ratio, u_a)
    h = min(grid[1], round(sqrt(keep * aspect)))
    w = min(grid[2], round(sqrt(keep / aspect)))
    if not (h and w):
        raise ValueError(
            f"masks: spatial_scale {blocks.spatial_scale} makes empty blocks on a grid of "
            f"{grid[1]} x {grid[2]} tokens; a larger scale or crop fits"
        )
    return t, h, w


def _between(bounds: tuple[float, float], u: float) -> float:
    return bounds[0] + u * (bounds[1] - bounds[0])


def covered(
    blocks: Blocks,
    grid: Grid,
    *,
    seed: int,
    step: int,
    rank: int,
    samples: Sequence[int],
    group: int,
    stream: int = 0,
) -> NDArray[np.bool_]:
    """Tokens under the union of each sample's blocks: bool [B, T, H, W], some token of each left
    free.

    Tokens of frames beyond `max_temporal_keep` count as covered. Samples without context are
    drawn again. Raises ValueError if no draw leaves context.
    """
    size = block_size(blocks, grid, seed=seed, step=step, group=group, stream=stream)
    room = np.array([side - s + 1 for side, s in zip(grid, size, strict=True)])
    late = np.arange(grid[0]) >= max(1, int(grid[0] * blocks.max_temporal_keep))
    generators = [
        _generator(seed, _PLACES, stream, step, group, rank * 2**32 + sample) for sample in samples
    ]
    out = np.empty((len(samples), *grid), dtype=np.bool_)
    todo = np.arange(len(samples))
    for _ in range(_MAX_REDRAWS):
        corner_BS3 = np.stack(
            [generators[i].integers(room, size=(blocks.num_blocks, 3)) for i in todo]
        )
        inside = [
            (line >= corner_BS3[..., axis, None])
            & (line < corner_BS3[..., axis, None] + size[axis])
            for axis, line in enumerate(map(np.arange, grid))
        ]
        union = (
            inside[0][..., :, None, None]
            & inside[1][..., None, :, None]
            & inside[2][..., None, None, :]
        ).any(axis=1)
        out[todo] = union | late[:, None, None]
        todo = todo[out[todo].all(axis=(1, 2, 3))]
        if not len(todo):
            return out
    raise ValueError(
        f"masks: {blocks.num_blocks} blocks of {size} tokens cover the whole grid {grid} every "
        "time; fewer or smaller blocks leave context"
    )
