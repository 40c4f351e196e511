"""Attention on a CPU: our own kernels where the processor has AVX-512, elsewhere PyTorch's flash.

Ours turn q and k as they read them, and the gradients back as they write them. Around flash that
takes passes of their own, into the order in which flash is fastest.

Measured with two threads of two EPYCs (benchmarks/cpu_choices.py). Flash attention in bfloat16 is
slower than in float32, which then runs instead. Its backward gains up to a tenth when long
sequences give it their keys 256 at a time, so that its scores stay in a core's cache, where the
processor has AVX-512 and 1 MiB of it; with AVX2 and 512 KiB it loses as much.

Shapes: B sequences, H heads, K tokens, C head channels.
"""

from typing import Any

import torch
from torch import Tensor

from fastjepa_kernels.library import must_be_one_op
from fastjepa_kernels.packed_attention import avx512
from fastjepa_kernels.precision import wide_vectors
from fastjepa_kernels.rope3d.op import as_factor, rotate_into

# From this length on the flash kernel takes 256 queries at a time, and keys are worth splitting
# likewise.
LONG = 768
KEYS_AT_ONCE = 256
# Ours subtracts no maximum: up to here float32 holds each exponential beside the largest.
LARGEST_SUM = 60.0
CPU = torch.device("cpu")

_aten = torch.ops.aten
_flash = _aten._scaled_dot_product_flash_attention_for_cpu


def _ours(backend: str, dtype: torch.dtype, channels: int) -> bool:
    # What compiles sees PyTorch's operations alone, and no value.
    if backend == "sdpa" or torch.compiler.is_compiling():
        return False
    refusal = avx512.refusal(CPU, dtype, channels)
    if refusal is not None and backend == "avx512":
        raise ValueError(f"attention: avx512 cannot run here: {refusal}")
    return refusal is None


def rotary_forward(
    qkv_BK3HC: Tensor, table_BKC2: Tensor, out_BKHC: Tensor, backend: str = "auto"
) -> Tensor:
    """Writes attention of packed q, k and v, q and k turned by a rotary table, and gives the
    log-sum-exp [B, H, K].

    out: of any strides but the last. `backend` and what is raised: of `forward`.
    """
    at_once = _at_once(qkv_BK3HC, backend)
    if at_once:
        lse = avx512.rotary_forward(qkv_BK3HC, table_BKC2, out_BKHC)
        if _within(lse):
            return lse
    q, k, v = _heads_first(qkv_BK3HC, table_BKC2, backend)
    out, lse = _flash(q, k, v) if at_once else forward(q, k, v, backend)
    out_BKHC.copy_(out.transpose(1, 2))
    return lse


def rotary_backward(
    grad_BKHC: Tensor,
    qkv_BK3HC: Tensor,
    table_BKC2: Tensor,
    out_BKHC: Tensor,
    lse_BHK: Tensor,
    dqkv_BK3HC: Tensor,
    backend: str = "auto",
) -> Tensor:
    """Writes the gradient of packed q, k and v; gives its sum over all B and K, [3, H, C] in that
    dtype or a wider one."""
    if _at_once(qkv_BK3HC, backend):
        return avx512.rotary_backward(
            grad_BKHC, qkv_BK3HC, table_BKC2, out_BKHC, lse_BHK, dqkv_BK3HC
        )
    q, k, v = _heads_first(qkv_BK3HC, table_BKC2, backend)
    grad, out = (x.transpose(1, 2).to(q.dtype) for x in (grad_BKHC, out_BKHC))
    dq, dk, dv = backward(grad, q, k, v, out, lse_BHK, backend)
    back = as_factor(table_BKC2, inverse=True)[:, None]
    to_q, to_k, to_v = dqkv_BK3HC.permute(2, 0, 3, 1, 4)
    rotate_into(dq, back, to_q)
    rotate_into(dk, back, to_k)
    to_v.copy_(dv)
    return dqkv_BK3HC.flatten(0, 1).sum(0)


def _at_once(qkv_BK3HC: Tensor, backend: str) -> bool:
    ours = _ours(backend, qkv_BK3HC.dtype, qkv_BK3HC.shape[-1])
    return ours and not must_be_one_op(qkv_BK3HC)


def _heads_first(qkv_BK3HC: Tensor, table_BKC2: Tensor, backend: str) -> Tensor:
    """Turned q, turned k and v [3, B, H, K, C], contiguous, in the dtype in which attention runs
    fastest without losing precision."""
    dtype = qkv_BK3HC.dtype
    if dtype == torch.bfloat16 and not _ours(backend, dtype, qkv_BK3HC.shape[-1]):
        dtype = torch.float32
    qkv = qkv_BK3HC.permute(2, 0, 3, 1, 4)
    out = torch.empty(qkv.shape, dtype=dtype, device=qkv.device)
    rotate_into(qkv[:2], as_factor(table_BKC2)[:, None], out[:2])
    out[2].copy_(qkv[2])
    return out


def _within(lse_BHK: Tensor) -> bool:
    """Whether our kernels' output is right."""
    return bool((lse_BHK.abs() <= LARGEST_SUM).all())


def forward(
    q_BHKC: Tensor, k_BHKC: Tensor, v_BHKC: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Attention output [B, H, K, C] (tokens before heads in memory) and log-sum-exp [B, H, K].

    `backend`: sdpa, avx512, or auto, which is the latter where it can be. Scores too large for our
    kernels, which are few if any, are PyTorch's. Raises ValueError where avx512 cannot be.
    """
    if _ours(backend, q_BHKC.dtype, q_BHKC.shape[-1]):
        out, lse = avx512.forward(q_BHKC, k_BHKC, v_BHKC)
        if _within(lse):
            return out, lse
    out, lse = _flash(q_BHKC, k_BHKC, v_BHKC)
    return out, lse


def backward(
    grad_BHKC: Tensor,
    q_BHKC: Tensor,
    k_BHKC: Tensor,
    v_BHKC: Tensor,
    out_BHKC: Tensor,
    lse_BHK: Tensor,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each [B, H, K, C].

    In flash's backward keys may be split because out and lse already know all of them: each part
    gives its own keys' and values' gradients and a summand of the queries'.
    """
    if _ours(backend, q_BHKC.dtype, q_BHKC.shape[-1]):
        return avx512.backward(grad_BHKC, q_BHKC, k_BHKC, v_BHKC, out_BHKC, lse_BHK)

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


class Avx512(torch.autograd.Function):
    """`forward` by our kernels as one differentiable function of q, k and v [B, H, K, C]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = forward(q, k, v, "avx512")
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, lse = ctx.saved_tensors
        return backward(grad, q, k, v, out, lse, "avx512")
