"""Rotary positions in three axes: one table of cosines and sines a forward, shared by all blocks.

Shapes: N grid tokens, H heads, C head channels. (docs/method.md section 2, rotary positions.)
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fastjepa.model.segments import Segment
from fastjepa.presets import Rope

# Height and width are interpolated to the span of the 256 px pretraining grid, whatever the patch.
PRETRAINING_PX = 256


def rotary_table(
    grid: tuple[int, int, int],
    head_dim: int,
    *,
    like: Tensor,
    patch: int = 16,
    interpolate: bool = True,
    rope: Rope = "interleaved",
) -> Tensor:
    """Cosine and sine of every token's angles: [N, C/2, 2] for the grid (T, H, W) in token order.

    The `tiled` layout has an angle of its own for each channel: [N, C, 2], for `turn_tiled`.

    Each axis turns `2 * ((C // 3) // 2)` channels, the rest stay (angle 0). With `interpolate`,
    height and width are scaled to the span of the pretraining grid; time never is; an axis of one
    token has position 0. Lies on the device of `like`, in float32 (float64 if `like` is), exact to
    rounding.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return _table(grid, head_dim, patch, interpolate, rope, dtype, like.device)


def packed_table(tables: Sequence[Tensor], segments: Sequence[Segment]) -> Tensor:
    """The tables [count or 1, length, ...] of segments as one with a row for each packed row."""
    rows = [
        table.expand(segment.count, *table.shape[1:]).flatten(0, 1)
        for table, segment in zip(tables, segments, strict=True)
    ]
    return torch.cat(rows)


def turn_tiled(qkv_N3HC: Tensor, table_NC2: Tensor) -> Tensor:
    """q and k of a packed qkv [..., N, 3, H, C] turned as V-JEPA 2 does; v as it is.

    table: [..., N, C, 2], leading dims broadcast. Neighbours (2j, 2j+1) are mixed as in a
    rotation, but each with a frequency of its own: no unit factor of a pair says that, so
    `rope3d` cannot. Computed in the table's dtype. Differentiable.
    """
    cos_N1HC, sin_N1HC = (t[..., None, None, :] for t in table_NC2.unbind(-1))
    qk = qkv_N3HC[..., :2, :, :].to(table_NC2.dtype)
    even, odd = qk.unflatten(-1, (-1, 2)).unbind(-1)
    turned = qk * cos_N1HC + torch.stack((-odd, even), dim=-1).flatten(-2) * sin_N1HC
    return torch.cat((turned.to(qkv_N3HC.dtype), qkv_N3HC[..., 2:, :, :]), dim=-3)


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # the first to ask may be without gradients, another not
def _table(
    grid: tuple[int, int, int],
    head_dim: int,
    patch: int,
    interpolate: bool,
    rope: Rope,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    pairs = (head_dim // 3) // 2
    if pairs == 0 or head_dim % 2:
        raise ValueError(f"head width: expected an even number of at least 6, got {head_dim}")
    span = PRETRAINING_PX // patch - 1
    frequency = 10_000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    places = [torch.arange(n, dtype=torch.float64) for n in grid]
    if interpolate:
        places[1:] = [p * span / (len(p) - 1) if len(p) > 1 else p for p in places[1:]]
    axes = [
        (place[:, None] * frequency).view(*(-1 if a == axis else 1 for a in range(3)), pairs)
        for axis, place in enumerate(places)
    ]
    rest = head_dim // 2 - 3 * pairs
    if rope == "tiled":
        axes, rest = [torch.cat((a, a), dim=-1) for a in axes], 2 * rest
    still = torch.zeros(1, 1, 1, rest, dtype=torch.float64)
    angle = torch.cat([a.expand(*grid, -1) for a in (*axes, still)], dim=-1).flatten(0, 2)
    return torch.stack((angle.cos(), angle.sin()), dim=-1).to(device=device, dtype=dtype)
