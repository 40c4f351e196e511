"""Exact attention on a CPU: PyTorch's flash kernels, called where and how they run fastest.

Measured with two threads of an EPYC: in float32 the backward gains a tenth when long sequences
give it their keys 256 at a time, so that its scores stay in a core's cache; in bfloat16 the
kernels only beat float32's on long sequences.

Shapes: B sequences, H heads, K tokens, C head channels.
"""

import torch
from torch import Tensor

# The kernel takes 256 queries at a time from this length on; keys are then worth splitting
# likewise.
LONG = 768
KEYS_AT_ONCE = 256

_aten = torch.ops.aten


def attention_dtype(dtype: torch.dtype, length: int) -> torch.dtype:
    """The dtype in which sequences of `length` tokens run fastest without losing precision."""
    return torch.float32 if dtype == torch.bfloat16 and length < LONG else dtype


def flash_forward(q_BHKC: Tensor, k_BHKC: Tensor, v_BHKC: Tensor) -> tuple[Tensor, Tensor]:
    """Attention output [B, H, K, C] (tokens before heads in memory) and log-sum-exp [B, H, K]."""
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q_BHKC, k_BHKC, v_BHKC)
    return out, lse


def flash_backward(
    grad_BHKC: Tensor,
    q_BHKC: Tensor,
    k_BHKC: Tensor,
    v_BHKC: Tensor,
    out_BHKC: Tensor,
    lse_BHK: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each [B, H, K, C].

    Keys may be split because out and lse already know all of them: each part gives its own keys'
    and values' gradients and a summand of the queries'.
    """

    def part(keys: slice) -> tuple[Tensor, Tensor, Tensor]:
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_BHKC, q_BHKC, k_BHKC[:, :, keys], v_BHKC[:, :, keys], out_BHKC, lse_BHK, 0.0, False
        )
        return grads[0], grads[1], grads[2]

    length = k_BHKC.shape[2]
    if length < LONG or q_BHKC.dtype != torch.float32:
        return part(slice(None))
    dq = torch.zeros_like(q_BHKC)
    dk, dv = torch.empty_like(k_BHKC), torch.empty_like(v_BHKC)
    for low in range(0, length, KEYS_AT_ONCE):
        keys = slice(low, low + KEYS_AT_ONCE)
        dq_part, dk[:, :, keys], dv[:, :, keys] = part(keys)
        dq += dq_part
    return dq, dk, dv
