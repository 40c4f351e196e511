"""How the kept tokens of several mask groups lie behind one another.

Shapes: B batch, K kept tokens, N grid tokens, R rows.
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
