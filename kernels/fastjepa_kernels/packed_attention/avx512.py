"""Attention on a CPU with AVX-512, in C++ (avx512.cpp): one pass over scores that are never stored.

Float32, and bfloat16 where the processor multiplies it (AVX-512 BF16); heads of 32, 64 or 128
channels. Sums are added up in float32 in an order that no number of threads changes. It takes
heads of q, k and v as they are, or packed and before their rotation, which it then does itself.

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


class _Table(ctypes.Structure):
    """A rotary table, as avx512.cpp has it; by default none."""

    _fields_ = (("at", ctypes.c_void_p), ("batch", ctypes.c_int64), ("token", ctypes.c_int64))

    @classmethod
    def of(cls, table_BKC2: Tensor, qkv_BK3HC: Tensor) -> "_Table":
        batch, tokens, *_, channels = qkv_BK3HC.shape
        one, *rest = table_BKC2.shape
        if one not in (1, batch) or rest != [tokens, channels // 2, 2]:
            raise ValueError(
                f"table: expected [{batch} or 1, {tokens}, {channels // 2}, 2], "
                f"got {list(table_BKC2.shape)}"
            )
        if table_BKC2.dtype != torch.float32 or table_BKC2.stride()[2:] != (2, 1):
            raise ValueError("table: expected float32 pairs side by side")
        step, token = table_BKC2.stride()[:2]
        return cls(table_BKC2.data_ptr(), 0 if one == 1 else step, token)


_SIZES = [ctypes.c_int] * 4
_cpp = Avx512(
    Path(__file__).with_suffix(".cpp"),
    {
        "forward": [ctypes.c_int, *[View] * 3, _Table, View, ctypes.c_void_p, *_SIZES],
        "backward": [
            ctypes.c_int,
            *[View] * 4,
            _Table,
            View,
            ctypes.c_void_p,
            *[View] * 3,
            ctypes.c_void_p,
            *_SIZES,
        ],
    },
)


def refusal(device: torch.device, dtype: torch.dtype, channels: int) -> str | None:
    """Why it cannot take heads of `channels` channels there; None if it can. The first call that
    gets so far compiles, which takes seconds once on a machine."""
    if channels not in CHANNELS:
        return f"it takes heads of 32, 64 or 128 channels, not {channels}"
    return _cpp.refusal(device, dtype)


def _check(like: Tensor, **tensors: Tensor) -> None:
    """Raises ValueError for what it cannot take, or what is not like the first."""
    why = refusal(like.device, like.dtype, like.shape[-1])
    if why is not None:
        raise ValueError(f"attention by avx512: {why}")
    for name, x in tensors.items():
        if x.shape != like.shape or x.dtype != like.dtype or x.device != like.device:
            raise ValueError(
                f"{name}: expected {like.dtype} {list(like.shape)} on a CPU, "
                f"got {x.dtype} {list(x.shape)} on {x.device.type}"
            )


def _run(name: str, x_BHKC: Tensor, *arguments: object) -> None:
    _cpp.run(name, IN_A_WORD[x_BHKC.dtype], *arguments, *x_BHKC.shape)


def forward(q_BHKC: Tensor, k_BHKC: Tensor, v_BHKC: Tensor) -> tuple[Tensor, Tensor]:
    """`softmax(q k^T / sqrt(C)) v` [B, H, K, C], tokens before heads in memory, and float32
    log-sum-exp [B, H, K].

    q, k, v: as `refusal` lets pass, any strides. No maximum is subtracted from the scores: where a
    log-sum-exp lies beyond +-60 the output need not be right, and is not finite where one is not.
    Raises ValueError for what `refusal` does not let pass, and for tensors that differ in shape or
    dtype. (docs/method.md section 2.)
    """
    if not q_BHKC.is_meta:
        _check(q_BHKC, k=k_BHKC, v=v_BHKC)
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
        _run("forward", q, *map(View.of, (q, k, v)), _Table(), View.of(out), lse.data_ptr())
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
    log-sum-exp. Raises ValueError as `forward` does."""
    _check(q_BHKC, grad=grad_BHKC, k=k_BHKC, v=v_BHKC, out=out_BHKC)
    grad, q, k, v, out = map(side_by_side, (grad_BHKC, q_BHKC, k_BHKC, v_BHKC, out_BHKC))
    lse = lse_BHK.contiguous()
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype) for _ in range(3))
    if q.numel():
        _run(
            "backward", q, *map(View.of, (grad, q, k, v)), _Table(), View.of(out), lse.data_ptr(),
            *map(View.of, (dq, dk, dv)), None,
        )  # fmt: skip
    return dq, dk, dv


def rotary_forward(qkv_BK3HC: Tensor, table_BKC2: Tensor, out_BKHC: Tensor) -> Tensor:
    """`forward` of packed q, k and v, q and k turned by a table first: writes the output, gives the
    log-sum-exp [B, H, K].

    table: float32 cosines and sines of channel pairs [B or 1, K, C/2, 2]. Channels lie side by
    side, tokens and heads anyhow. Raises ValueError for what is not so. (docs/method.md section 2.)
    """
    _check(qkv_BK3HC[:, :, 0], out=out_BKHC)
    q, k, v = qkv_BK3HC.permute(2, 0, 3, 1, 4).unbind()
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    if q.numel():
        _run(
            "forward", q, *map(_view, (q, k, v)), _Table.of(table_BKC2, qkv_BK3HC),
            _view(out_BKHC.transpose(1, 2)), lse.data_ptr(),
        )  # fmt: skip
    return lse


def rotary_backward(
    grad_BKHC: Tensor,
    qkv_BK3HC: Tensor,
    table_BKC2: Tensor,
    out_BKHC: Tensor,
    lse_BHK: Tensor,
    dqkv_BK3HC: Tensor,
) -> Tensor:
    """Writes the gradient of `rotary_forward`'s packed q, k and v, and gives its sum over all B and
    K, float32 [3, H, C]. Raises ValueError as it does."""
    _check(qkv_BK3HC[:, :, 0], grad=grad_BKHC, out=out_BKHC)
    _check(qkv_BK3HC, dqkv=dqkv_BK3HC)
    q, k, v = qkv_BK3HC.permute(2, 0, 3, 1, 4).unbind()
    grad, out = grad_BKHC.transpose(1, 2), out_BKHC.transpose(1, 2)
    lse = lse_BHK.contiguous()
    sum_3HC = torch.zeros(qkv_BK3HC.shape[2:])
    if q.numel():
        _run(
            "backward", q, *map(_view, (grad, q, k, v)), _Table.of(table_BKC2, qkv_BK3HC),
            _view(out), lse.data_ptr(), *map(_view, dqkv_BK3HC.permute(2, 0, 3, 1, 4)),
            sum_3HC.data_ptr(),
        )  # fmt: skip
    return sum_3HC


def _view(x_BHKC: Tensor) -> View:
    if x_BHKC.stride(-1) != 1:
        raise ValueError(f"expected channels side by side, got strides {x_BHKC.stride()}")
    return View.of(x_BHKC)
