"""Attention within each packed sequence as the formula says it.

Shapes: R rows of all sequences, K rows of one, H heads, C head channels.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor


def packed_attention(q_RHC: Tensor, k_RHC: Tensor, v_RHC: Tensor, starts_B1: Tensor) -> Tensor:
    """`softmax(q k^T / sqrt(C)) v` of each sequence and head: [R, H, C]."""
    return over_sequences(_attention, q_RHC, k_RHC, v_RHC, starts_B1)


def over_sequences(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor],
    q_RHC: Tensor,
    k_RHC: Tensor,
    v_RHC: Tensor,
    starts_B1: Tensor,
) -> Tensor:
    """`attention` of [H, K, C], one sequence after the other; the host waits for the starts."""
    starts = starts_B1.tolist()
    parts = [
        attention(*(x_RHC[start:end].transpose(0, 1) for x_RHC in (q_RHC, k_RHC, v_RHC)))
        for start, end in pairwise(starts)
        if start < end
    ]
    return torch.cat([q_RHC[:0], *(part_HKC.transpose(0, 1) for part_HKC in parts)])


def _attention(q_HKC: Tensor, k_HKC: Tensor, v_HKC: Tensor) -> Tensor:
    score_HKK = q_HKC @ k_HKC.transpose(1, 2) * q_HKC.shape[-1] ** -0.5
    out: Tensor = score_HKK.softmax(-1) @ v_HKC
    return out
