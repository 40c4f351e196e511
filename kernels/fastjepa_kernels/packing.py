"""How the kept tokens of several mask groups lie behind one another.

Shapes: B batch, K kept tokens, N grid tokens, R rows, ... further dims.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def packed_rows(
    groups_BK: Sequence[Tensor], num_tokens: int, clips: Sequence[int] | None = None
) -> Tensor:
    """Token indices [B, K] of each group as rows `b * num_tokens + token` of all tokens: [R].

    `clips`: the clip that each group starts with; None is the first one for all.
    """
    return torch.cat(
        [
            (index + (_clips(index) + first) * num_tokens).flatten()
            for index, first in zip(groups_BK, clips or [0] * len(groups_BK), strict=True)
        ]
    )


def _clips(index_BK: Tensor) -> Tensor:
    return torch.arange(len(index_BK), device=index_BK.device)[:, None]


def by_group(packed_R: Tensor, groups_BK: Sequence[Tensor]) -> list[Tensor]:
    """Packed rows [R, ...] as those of each group: views [B, K, ...]."""
    parts = packed_R.split([index.numel() for index in groups_BK])
    return [part.unflatten(0, index.shape) for part, index in zip(parts, groups_BK, strict=True)]
