"""Rotary positions as one complex product: a channel pair is a complex number, its angle a unit
factor.

One pass over q and k, where the textbook form takes a dozen. Half precision is rotated in float32.

Shapes: N tokens, H heads, C head channels, ... leading dims.
"""

import torch
from torch import Tensor


def as_factor(table_C2: Tensor, *, inverse: bool = False) -> Tensor:
    """The table [..., C/2, 2] as complex factors [..., C/2]; conjugated (the backward) if
    `inverse`."""
    factor_C = torch.view_as_complex(table_C2)
    return factor_C.conj().resolve_conj() if inverse else factor_C


def rotate_into(x_C: Tensor, factor_C: Tensor, out_C: Tensor) -> None:
    """Write x rotated by complex factors into `out_C`, which may be x itself or of another dtype.

    The last dimensions of both are contiguous.
    """
    wide_C = x_C if x_C.dtype in (torch.float32, torch.float64) else x_C.float()
    x = torch.view_as_complex(wide_C.unflatten(-1, (-1, 2)))
    if out_C.dtype == wide_C.dtype:
        torch.mul(x, factor_C, out=torch.view_as_complex(out_C.unflatten(-1, (-1, 2))))
    else:
        out_C.copy_(torch.view_as_real(x * factor_C).flatten(-2))


class _Rope3d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, qkv_N3HC: Tensor, table_NC2: Tensor
    ) -> Tensor:
        ctx.save_for_backward(table_NC2)
        return _rotated(qkv_N3HC, as_factor(table_NC2))

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_N3HC: Tensor
    ) -> tuple[Tensor, None]:
        (table_NC2,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return _rotated(grad_N3HC, as_factor(table_NC2, inverse=True)), None


def _rotated(qkv_N3HC: Tensor, factor_NC: Tensor) -> Tensor:
    out = torch.empty_like(qkv_N3HC, memory_format=torch.contiguous_format)
    qk, v = qkv_N3HC[..., :2, :, :], qkv_N3HC[..., 2, :, :]
    rotate_into(qk, factor_NC[..., None, None, :], out[..., :2, :, :])
    out[..., 2, :, :].copy_(v)
    return out


def rope3d(qkv_N3HC: Tensor, table_NC2: Tensor) -> Tensor:
    """Rotate q and k of a packed qkv; v passes through. Differentiable; backward is the inverse
    turn.

    qkv_N3HC: [..., N, 3, H, C], C even, last dim contiguous, any float dtype. table_NC2: [..., N,
    C/2, 2] float32 (float64 for float64 qkv): cos and sin, leading dims broadcast. Raises
    ValueError for shapes or dtypes that do not fit. (docs/method.md section 2.)
    """
    if qkv_N3HC.ndim < 4 or qkv_N3HC.shape[-3] != 3:
        raise ValueError(f"qkv: expected shape [..., N, 3, H, C], got {tuple(qkv_N3HC.shape)}")
    tokens, channels = qkv_N3HC.shape[-4], qkv_N3HC.shape[-1]
    if channels % 2:
        raise ValueError(f"qkv: expected an even number of head channels, got {channels}")
    if tuple(table_NC2.shape[-3:]) != (tokens, channels // 2, 2):
        raise ValueError(
            f"table: expected shape [..., {tokens}, {channels // 2}, 2], "
            f"got {tuple(table_NC2.shape)}"
        )
    wanted = torch.float64 if qkv_N3HC.dtype == torch.float64 else torch.float32
    if table_NC2.dtype != wanted:
        raise ValueError(
            f"table: expected {wanted} for a {qkv_N3HC.dtype} qkv, got {table_NC2.dtype}"
        )
    out: Tensor = _Rope3d.apply(qkv_N3HC, table_NC2)  # type: ignore[no-untyped-call]
    return out
