"""Attention on a CPU with AVX-512, in C++ (avx512.cpp): one pass over scores that are never stored.

Float32, and bfloat16 where the processor multiplies it (AVX-512 BF16); heads of 32, 64 or 128
channels. Sums are added up in float32 in an order that no number of threads changes.

Shapes: B sequences, H heads, K tokens, C head channels.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from ..avx512 import IN_A_WORD, Avx512, View
from ..library import custom_op, must_be_one_op
from .op import side_by_side

CHANNELS = (32, 64, 128)


_SIZES = [ctypes.c_int] * 4
_cpp = Avx512(
    Path(__file__).with_suffix(".cpp"),
    {
        "forward": [ctypes.c_int, *[View] * 4, ctypes.c_void_p, *_SIZES],
        "backward": [ctypes.c_int, *[View] * 5, ctypes.c_void_p, *[View] * 3, *_SIZES],
    },
)


def refusal(device: torch.device, dtype: torch.dtype, channels: int) -> str | None:
    """Why it cannot take heads of `channels` channels there; None if it can. The first call that
    gets so far compiles, which takes seconds once on a machine."""
    if channels not in CHANNELS:
        return f"it takes heads of 32, 64 or 128 channels, not {channels}"
    return _cpp.refusal(device, dtype)


def _run(name: str, x_BHKC: Tensor, *arguments: object) -> None:
    _cpp.run(name, IN_A_WORD[x_BHKC.dtype], *arguments, *x_BHKC.shape)


def forward(q_BHKC: Tensor, k_BHKC: Tensor, v_BHKC: Tensor) -> tuple[Tensor, Tensor]:
    """`softmax(q k^T / sqrt(C)) v` [B, H, K, C], tokens before heads in memory, and float32
    log-sum-exp [B, H, K].

    q, k, v: as `refusal` lets pass, any strides. No maximum is subtracted from the scores: where a
    log-sum-exp lies beyond +-60 the output need not be right, and is not finite where one is not.
    (docs/method.md section 2.)
    """
    # The first call of the op in a process loads Triton.
    run = _forward_op if must_be_one_op(q_BHKC, k_BHKC, v_BHKC) else _forward
    out, lse = run(q_BHKC, k_BHKC, v_BHKC)
    return out, lse


def _forward(q_BHKC: Tensor, k_BHKC: Tensor, v_BHKC: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = (side_by_side(x) for x in (q_BHKC, k_BHKC, v_BHKC))
    out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format)
    out = out.transpose(1, 2)
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    if q.numel():
        _run("forward", q, *map(View.of, (q, k, v, out)), lse.data_ptr())
    return out, lse


_forward_op = custom_op("attention_avx512")(_forward)


def backward(
    grad_BHKC: Tensor,
    q_BHKC: Tensor,
    k_BHKC: Tensor,
    v_BHKC: Tensor,
    out_BHKC: Tensor,
    lse_BHK: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each a contiguous [B, H, K, C], from anyone's output and float32
    log-sum-exp."""
    grad, q, k, v, out = map(side_by_side, (grad_BHKC, q_BHKC, k_BHKC, v_BHKC, out_BHKC))
    lse = lse_BHK.contiguous()
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype) for _ in range(3))
    if q.numel():
        _run(
            "backward", q, *map(View.of, (grad, q, k, v, out)), lse.data_ptr(),
            *map(View.of, (dq, dk, dv)),
        )  # fmt: skip
    return dq, dk, dv
