"""Rotary positions on the packed qkv, out of place and in place.

On a GPU one kernel reads and writes every element once (kernel.py). The twin here takes a channel
pair as a complex number and its angle as a unit factor: one product over q and k, where the
textbook form takes a dozen passes; half precision is turned in float32.

Shapes: B clips (all leading dims), N tokens, M table rows, H heads, C head channels, ... leading
dims.
"""

from typing import Any

import torch
from torch import Tensor

from ..backend import Backend, use_triton
from ..checks import INDEX_DTYPES, check_in_range, check_same_device
from ..library import custom_op, watched
from ..precision import wide

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def rope3d(
    qkv_N3HC: Tensor,
    table_MC2: Tensor,
    index_N: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Rotate q and k of a packed qkv; v passes through. Differentiable; backward is the inverse
    turn.

    qkv_N3HC: [..., N, 3, H, C], C even, float16 to float64, any strides. table_MC2: cos and sin,
    float32 (float64 for float64 qkv), either [..., N, C/2, 2], or, with `index_N` ([..., N] int32
    or int64), a table [M, C/2, 2] whose row `index[n]` is token n's. Leading dims of the table or
    the index broadcast. Channels of angle 0 stay. Returns a contiguous tensor like qkv. Raises
    ValueError for shapes, dtypes, devices or indices that do not fit. (docs/method.md section 2.)
    """
    _check(qkv_N3HC, table_MC2, index_N)
    out: Tensor = _rope3d(qkv_N3HC, table_MC2, index_N, False, backend)
    return out


def rope3d_(
    qkv_N3HC: Tensor,
    table_MC2: Tensor,
    index_N: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """`rope3d` in place: writes q and k only, v is neither read nor written. Returns qkv.

    Differentiable; the backward does not write into the gradient that comes in, since autograd
    may have handed it to others too. If qkv is a view (an `unflatten` of a product, say), autograd
    copies the gradient of what it is a view of: with a backward, `rope3d` moves less then. Raises
    ValueError as `rope3d` does, and for a qkv that is a leaf that requires grad or that is
    expanded. (docs/method.md section 2.)
    """
    _check(qkv_N3HC, table_MC2, index_N)
    if torch.is_grad_enabled() and qkv_N3HC.requires_grad and qkv_N3HC.is_leaf:
        raise ValueError("qkv: a leaf that requires grad cannot be rotated in place")
    pairs = zip(qkv_N3HC.shape, qkv_N3HC.stride(), strict=True)
    if any(size > 1 and stride == 0 for size, stride in pairs):
        raise ValueError(
            f"qkv: an expanded tensor (strides {qkv_N3HC.stride()}) cannot be rotated in place"
        )
    out: Tensor = _InPlace.apply(qkv_N3HC, table_MC2, index_N, backend)  # type: ignore[no-untyped-call]
    return out


@watched
def turn_rows_(qkv_R3HC: Tensor, table_RC2: Tensor, *, backend: Backend = "auto") -> Tensor:
    """`rope3d_` of rows that share no table row, for forwards written by hand: no graph.

    table_RC2: [R, C/2, 2] beside a qkv [R, 3, H, C] whose channel pairs lie side by side.
    """
    _check(qkv_R3HC, table_RC2, None)
    if len(qkv_R3HC):
        rows = qkv_R3HC[None]
        _turn(rows, torch.Size((1,)), table_RC2, None, rows, False, backend)
    return qkv_R3HC


@watched
def turned_gradient(
    dq_RHC: Tensor,
    dk_RHC: Tensor,
    dv_RHC: Tensor,
    table_RC2: Tensor,
    *,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """The gradient of a packed qkv [R, 3, H, C] from those of turned q, turned k and v [R, H, C],
    and its sum over rows [3, H, C], float32 at least: the gradient of a bias.

    table_RC2: [R, C/2, 2], as for `turn_rows_`, whose backward this is: q's and k's are turned back
    while the three are laid side by side. Raises ValueError for shapes that do not fit.
    """
    for name, part in (("dk", dk_RHC), ("dv", dv_RHC)):
        if part.shape != dq_RHC.shape or part.dtype != dq_RHC.dtype:
            raise ValueError(
                f"{name}: expected {dq_RHC.dtype} {tuple(dq_RHC.shape)} like dq, "
                f"got {part.dtype} {tuple(part.shape)}"
            )
    rows, heads, channels = dq_RHC.shape
    out_R3HC = dq_RHC.new_empty((rows, 3, heads, channels))
    _check(out_R3HC, table_RC2, None)
    if rows == 0:
        return out_R3HC, table_RC2.new_zeros((3, heads, channels))
    dq, dk, dv = (_paired(part) for part in (dq_RHC, dk_RHC, dv_RHC))
    if use_triton(backend, dq_RHC):
        from . import kernel

        return out_R3HC, kernel.pack(dq, dk, dv, table_RC2.flatten(-2), out_R3HC)
    factor_R1P = as_factor(_paired(table_RC2), inverse=True)[:, None]
    rotate_into(dq, factor_R1P, out_R3HC[:, 0])
    rotate_into(dk, factor_R1P, out_R3HC[:, 1])
    out_R3HC[:, 2].copy_(dv)
    return out_R3HC, out_R3HC.sum(0, dtype=table_RC2.dtype)


def as_factor(table_C2: Tensor, *, inverse: bool = False) -> Tensor:
    """The table [..., C/2, 2] as complex factors [..., C/2]; conjugated (the backward) if
    `inverse`."""
    factor_C = torch.view_as_complex(table_C2)
    return factor_C.conj().resolve_conj() if inverse else factor_C


def rotate_into(x_C: Tensor, factor_C: Tensor, out_C: Tensor) -> None:
    """Write x rotated by complex factors into `out_C`, which may be x itself or of another dtype.

    The last dimensions of both are contiguous.
    """
    narrow = x_C.dtype not in (torch.float32, torch.float64)
    if narrow and out_C.is_contiguous():
        # What follows is slow on rows that lie apart.
        x_C = out_C.copy_(x_C)
    wide_C = x_C.to(wide(x_C.dtype))
    x = torch.view_as_complex(wide_C.unflatten(-1, (-1, 2)))
    if out_C.dtype == wide_C.dtype:
        torch.mul(x, factor_C, out=torch.view_as_complex(out_C.unflatten(-1, (-1, 2))))
    else:
        turned = x.mul_(factor_C) if narrow else x * factor_C
        out_C.copy_(torch.view_as_real(turned).flatten(-2))


def _check(qkv_N3HC: Tensor, table_MC2: Tensor, index_N: Tensor | None) -> None:
    if qkv_N3HC.ndim < 4 or qkv_N3HC.shape[-3] != 3:
        raise ValueError(f"qkv: expected shape [..., N, 3, H, C], got {tuple(qkv_N3HC.shape)}")
    if qkv_N3HC.dtype not in DTYPES:
        raise ValueError(f"qkv: expected float16, bfloat16, float32 or 64, got {qkv_N3HC.dtype}")
    lead, tokens, channels = qkv_N3HC.shape[:-4], qkv_N3HC.shape[-4], qkv_N3HC.shape[-1]
    if channels % 2 or channels == 0:
        raise ValueError(f"qkv: expected an even number of head channels, got {channels}")
    shape = tuple(table_MC2.shape)
    if index_N is None:
        fits = shape[-3:] == (tokens, channels // 2, 2) and _broadcasts(shape[:-3], lead)
        expected = f"[..., {tokens}, {channels // 2}, 2]"
    else:
        fits = len(shape) == 3 and shape[1:] == (channels // 2, 2)
        expected = f"[M, {channels // 2}, 2] with an index"
    if not fits:
        raise ValueError(f"table: expected shape {expected} for a qkv of {tuple(lead)} leading "
                         f"dims, got {shape}")  # fmt: skip
    wanted = wide(qkv_N3HC.dtype)
    if table_MC2.dtype != wanted:
        raise ValueError(
            f"table: expected {wanted} for a {qkv_N3HC.dtype} qkv, got {table_MC2.dtype}"
        )
    if index_N is not None and not (
        index_N.dtype in INDEX_DTYPES
        and index_N.ndim
        and index_N.shape[-1] == tokens
        and _broadcasts(index_N.shape[:-1], lead)
    ):
        raise ValueError(
            f"index: expected int32 or int64 [..., {tokens}] for a qkv of {tuple(lead)} leading "
            f"dims, got {index_N.dtype} {tuple(index_N.shape)}"
        )
    check_same_device(qkv=qkv_N3HC, table=table_MC2, index=index_N)


def _broadcasts(shape: tuple[int, ...], lead: tuple[int, ...]) -> bool:
    fits = all(a in (1, b) for a, b in zip(shape[::-1], lead[::-1], strict=False))
    return len(shape) <= len(lead) and fits


@custom_op("rope3d")
def _rope3d(
    qkv: Tensor, table: Tensor, index: Tensor | None, inverse: bool, backend: str
) -> Tensor:
    out = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    if qkv.numel():
        flat = qkv.shape[-4:]
        x_BN3HC = _paired(qkv).reshape(-1, *flat)
        _turn(x_BN3HC, qkv.shape[:-4], table, index, out.view(-1, *flat), inverse, backend)
    return out


@_rope3d.register_fake
def _(qkv: Tensor, table: Tensor, index: Tensor | None, inverse: bool, backend: str) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, table, index, ctx.inverse, ctx.backend = inputs
    ctx.save_for_backward(table, index)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    table, index = ctx.saved_tensors
    return _rope3d(grad, table, index, not ctx.inverse, ctx.backend), None, None, None, None


_rope3d.register_autograd(_backward, setup_context=_setup)


@custom_op("rope3d_in_place", mutates=("qkv",))
def _rope3d_in_place(qkv: Tensor, table: Tensor, index: Tensor | None, backend: str) -> None:
    if qkv.numel():
        x_BN3HC = _paired(qkv).reshape(-1, *qkv.shape[-4:])
        _turn(x_BN3HC, qkv.shape[:-4], table, index, x_BN3HC, False, backend)
        if x_BN3HC.data_ptr() != qkv.data_ptr():
            qkv.copy_(x_BN3HC.view(qkv.shape))


@_rope3d_in_place.register_fake
def _(qkv: Tensor, table: Tensor, index: Tensor | None, backend: str) -> None:
    return None


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, table: Tensor, index: Tensor | None, backend: str) -> Tensor:
        _rope3d_in_place(qkv, table, index, backend)
        ctx.mark_dirty(qkv)
        ctx.save_for_backward(table, index)
        ctx.backend = backend
        return qkv

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        table, index = ctx.saved_tensors
        return _rope3d(grad, table, index, True, ctx.backend), None, None, None


def _turn(
    x_BN3HC: Tensor,
    lead: torch.Size,
    table: Tensor,
    index: Tensor | None,
    out_BN3HC: Tensor,
    inverse: bool,
    backend: str,
) -> None:
    if index is not None:
        check_in_range("index", index, len(table), "the table")
    table = _paired(table)
    if use_triton(backend, x_BN3HC):
        from . import kernel

        table_BMC = _over_clips(table.flatten(-2), lead, 2)
        index_BN = None if index is None else _over_clips(index, lead, 1)
        kernel.rope3d(x_BN3HC, table_BMC, index_BN, out_BN3HC, inverse)
        return
    factor = as_factor(table if index is None else table[index], inverse=inverse)
    factor_BNC = _over_clips(factor, lead, 2)[:, :, None, None]
    rotate_into(x_BN3HC[:, :, :2], factor_BNC, out_BN3HC[:, :, :2])
    if out_BN3HC is not x_BN3HC:
        out_BN3HC[:, :, 2].copy_(x_BN3HC[:, :, 2])


def _over_clips(x: Tensor, lead: torch.Size, dims: int) -> Tensor:
    """x broadcast over all leading dims and those as one; a view unless only some are broadcast."""
    return x.expand(*lead, *x.shape[-dims:]).reshape(-1, *x.shape[-dims:])


def _paired(x: Tensor) -> Tensor:
    """x, or a copy if its pairs of neighbours cannot be viewed as complex numbers."""
    even = x.storage_offset() % 2 == 0 and all(stride % 2 == 0 for stride in x.stride()[:-1])
    if even and x.stride(-1) == 1:
        return x
    return x.clone(memory_format=torch.contiguous_format)
