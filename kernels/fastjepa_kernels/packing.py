"""How the kept tokens of several mask groups lie behind one another.

Shapes: B batch, K kept tokens, N grid tokens, R rows, ... further dims.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def packed_rows(groups_BK: Sequence[Tensor], num_tokens: int) -> Tensor:
    """Token indices [B, K] of each group as rows `b * num_tokens + token` of all tokens: [R]."""
    return torch.cat(
        [
            (index + torch.arange(len(index), device=index.device)[:, None] * num_tokens).flatten()
            for index in groups_BK
        ]
    )


def by_group(packed_R: Tensor, groups_BK: Sequence[Tensor]) -> list[Tensor]:
    """Packed rows [R, ...] as those of each group: views [B, K, ...]."""
    parts = packed_R.split([index.numel() for index in groups_BK])
    return [part.unflatten(0, index.shape) for part, index in zip(parts, groups_BK, strict=True)]
