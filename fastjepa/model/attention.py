"""Attention behind one call: interchangeable exact backends over a packed batch.

Shapes: R rows, B sequences, K tokens of a sequence, H heads, C head channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastjepa.model.segments import Segment

BACKENDS = ("auto", "sdpa", "math")


def attend(qkv_R3HC: Tensor, segments: Sequence[Segment], *, backend: str = "auto") -> Tensor:
    """Softmax attention of each sequence on itself, not causal, scale C^-0.5: [R, 3, H, C] -> [R,
    H, C].

    `sdpa` is PyTorch's scaled_dot_product_attention (flash kernels where it has them), `math` the
    formula; `auto` takes `sdpa`. Raises ValueError for another name.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    kernel = _math if backend == "math" else F.scaled_dot_product_attention
    parts = []
    for segment in segments:
        q, k, v = (t.transpose(1, 2) for t in segment.rows(qkv_R3HC).unbind(2))
        parts.append(kernel(q, k, v).transpose(1, 2).flatten(0, 1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _math(q_BHKC: Tensor, k_BHKC: Tensor, v_BHKC: Tensor) -> Tensor:
    scores = q_BHKC @ k_BHKC.transpose(-1, -2) * q_BHKC.shape[-1] ** -0.5
    out: Tensor = scores.softmax(-1) @ v_BHKC
    return out
