"""Attention on a CPU, by what runs fastest.

PyTorch's flash kernels in float32, and in bfloat16 plain products (attention_products.py), but on
the shortest sequences, if the processor multiplies bfloat16. Measured with two threads of two EPYCs
(benchmarks/cpu_choices.py): flash's backward gains up to a tenth when long sequences give it their
keys 256 at a time, so that its scores stay in a core's cache, where the processor has AVX-512 and
1 MiB of it; with AVX2 and 512 KiB it loses as much. In bfloat16 flash only beats itself in float32
on long sequences, and products beat both.

Shapes: B sequences, H heads, K tokens, C head channels.
"""

import torch
from torch import Tensor

from fastjepa.model import attention_products
from fastjepa.model.products_cpu import wide_vectors
from fastjepa_kernels.precision import multiplies_bfloat16

# From this length on the flash kernel takes 256 queries at a time, and keys are worth splitting
# likewise.
LONG = 768
# From this length on bfloat16 is worth its casts.
LONG_IN_BFLOAT16 = 96
KEYS_AT_ONCE = 256

_aten = torch.ops.aten


def attention_dtype(dtype: torch.dtype, length: int) -> torch.dtype:
    """The dtype in which sequences of `length` tokens run fastest without losing precision."""
    if dtype != torch.bfloat16 or (length >= LONG_IN_BFLOAT16 and multiplies_bfloat16()):
        return dtype
    return torch.float32


def _by_products(q_BHKC: Tensor, k_BHKC: Tensor) -> bool:
    return (
        q_BHKC.dtype == torch.bfloat16
        and multiplies_bfloat16()
        and attention_products.scores_are_small(q_BHKC, k_BHKC)
    )


def forward(q_BHKC: Tensor, k_BHKC: Tensor, v_BHKC: Tensor) -> tuple[Tensor, Tensor]:
    """Attention output [B, H, K, C] (tokens before heads in memory) and log-sum-exp [B, H, K]."""
    if _by_products(q_BHKC, k_BHKC):
        out, lse = attention_products.forward(q_BHKC, k_BHKC, v_BHKC)
        return out, lse
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q_BHKC, k_BHKC, v_BHKC)
    return out, lse


def backward(
    grad_BHKC: Tensor,
    q_BHKC: Tensor,
    k_BHKC: Tensor,
    v_BHKC: Tensor,
    out_BHKC: Tensor,
    lse_BHK: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each [B, H, K, C].

    In flash's backward keys may be split because out and lse already know all of them: each part
    gives its own keys' and values' gradients and a summand of the queries'.
    """
    if _by_products(q_BHKC, k_BHKC):
        return attention_products.backward(grad_BHKC, q_BHKC, k_BHKC, v_BHKC, out_BHKC, lse_BHK)

    def part(keys: slice) -> tuple[Tensor, Tensor, Tensor]:
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_BHKC, q_BHKC, k_BHKC[:, :, keys], v_BHKC[:, :, keys], out_BHKC, lse_BHK, 0.0, False
        )
        return grads[0], grads[1], grads[2]

    length = k_BHKC.shape[2]
    if length < LONG or q_BHKC.dtype != torch.float32 or not wide_vectors():
        return part(slice(None))
    dq = torch.zeros_like(q_BHKC)
    dk, dv = torch.empty_like(k_BHKC), torch.empty_like(v_BHKC)
    for low in range(0, length, KEYS_AT_ONCE):
        keys = slice(low, low + KEYS_AT_ONCE)
        dq_part, dk[:, :, keys], dv[:, :, keys] = part(keys)
        dq += dq_part
    return dq, dk, dv
