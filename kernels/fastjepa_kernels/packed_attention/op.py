"""Exact attention within packed sequences, not causal.

On a GPU three kernels that never store a score (kernel.py). The twin runs PyTorch's fused
attention, one sequence after the other. Called up to a hundred times a step, so in eager mode the
kernels sit in an autograd function, which costs the host a fraction of what a registered op does;
`torch.compile` sees registered ops.

Shapes: R rows of all sequences, B sequences, K rows of one, H heads, C head channels.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..backend import Backend, use_triton
from ..checks import check_same_device, reads_values
from ..library import custom_op, must_be_one_op, on_their_device
from .reference import over_sequences

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KERNEL_DTYPES = (torch.float16, torch.bfloat16)
FEWEST, MOST, MULTIPLE = 16, 128, 8


def packed_attention(
    q_RHC: Tensor,
    k_RHC: Tensor,
    v_RHC: Tensor,
    starts_B1: Tensor,
    longest: int,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """`softmax(q k^T / sqrt(C)) v` within each sequence: every row attends to all of its own.

    q, k, v: [R, H, C] of one dtype, float16 to float64, any strides; views of one packed
    [R, 3, H, C] are not copied. starts: int32 [B + 1], the first row of each sequence and the end,
    from 0 to R. longest: rows of the longest sequence, or more. The kernel takes half precision
    and 16 to 128 channels in steps of 8; for others `auto` is the twin, which reads `starts` on
    the host. Returns a contiguous [R, H, C], differentiable once. Raises ValueError for shapes,
    dtypes, devices, or starts that do not fit. (docs/method.md section 2.)
    """
    _check(q_RHC, k_RHC, v_RHC, starts_B1, longest)
    if not (_kernel_runs(backend, q_RHC) and q_RHC.numel()):
        return over_sequences(_fused, q_RHC, k_RHC, v_RHC, starts_B1)
    if must_be_one_op(q_RHC, k_RHC, v_RHC):
        out: Tensor = _packed_attention(q_RHC, k_RHC, v_RHC, starts_B1, longest)[0]
        return out
    out = _Attention.apply(q_RHC, k_RHC, v_RHC, starts_B1, longest)  # type: ignore[no-untyped-call]
    return out


def _fused(q_HKC: Tensor, k_HKC: Tensor, v_HKC: Tensor) -> Tensor:
    out: Tensor = F.scaled_dot_product_attention(q_HKC[None], k_HKC[None], v_HKC[None])[0]
    return out


def _check(
    q_RHC: Tensor, k_RHC: Tensor, v_RHC: Tensor, starts_B1: Tensor, longest: int
) -> None:  # fmt: skip
    if q_RHC.ndim != 3:
        raise ValueError(f"q: expected shape [R, H, C], got {tuple(q_RHC.shape)}")
    if q_RHC.dtype not in DTYPES:
        raise ValueError(f"q: expected float16, bfloat16, float32 or 64, got {q_RHC.dtype}")
    for name, x_RHC in (("k", k_RHC), ("v", v_RHC)):
        if x_RHC.shape != q_RHC.shape or x_RHC.dtype != q_RHC.dtype:
            raise ValueError(
                f"{name}: expected {q_RHC.dtype} {tuple(q_RHC.shape)} like q, got {x_RHC.dtype} "
                f"{tuple(x_RHC.shape)}"
            )
    if starts_B1.dtype != torch.int32 or starts_B1.ndim != 1 or not len(starts_B1):
        raise ValueError(
            f"starts: expected int32 [B + 1], got {starts_B1.dtype} {tuple(starts_B1.shape)}"
        )
    check_same_device(q=q_RHC, k=k_RHC, v=v_RHC, starts=starts_B1)
    if longest < min(len(q_RHC), 1):
        raise ValueError(f"longest: expected the rows of the longest sequence, got {longest}")
    if torch.compiler.is_compiling() or not reads_values(starts_B1):
        return
    starts, rows = starts_B1.tolist(), len(q_RHC)
    if starts[0] != 0 or starts[-1] != rows or starts != sorted(starts):
        raise ValueError(f"starts: expected ascending places from 0 to {rows}, got {starts}")
    found = max((end - start for start, end in pairwise(starts)), default=0)
    if found > longest:
        raise ValueError(f"longest: a sequence has {found} rows, more than {longest}")


def _kernel_runs(backend: str, q_RHC: Tensor) -> bool:
    """Raises ValueError where the kernel was asked for and does not take these inputs."""
    if not use_triton(backend, q_RHC):
        return False
    channels = q_RHC.shape[-1]
    if q_RHC.dtype not in KERNEL_DTYPES:
        refusal = f"takes float16 and bfloat16, got {q_RHC.dtype}"
    elif not FEWEST <= channels <= MOST or channels % MULTIPLE:
        refusal = f"takes {FEWEST} to {MOST} channels in steps of {MULTIPLE}, got {channels}"
    else:
        return True
    if backend == "triton":
        raise ValueError(f"backend: triton {refusal}")
    return False


@on_their_device
def _forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int
) -> tuple[Tensor, Tensor]:
    from . import kernel

    rows, heads, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    shift = q.new_empty((heads, rows), dtype=torch.float32)
    kernel.forward(side_by_side(q), side_by_side(k), side_by_side(v), starts.contiguous(),
                   longest, out, shift)  # fmt: skip
    return out, shift


@on_their_device
def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, shift: Tensor, starts: Tensor,
    longest: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from . import kernel

    dq, dk, dv = (torch.empty_like(out) for _ in range(3))
    dout, q, k, v = (side_by_side(x) for x in (dout, q, k, v))
    starts, pair = starts.contiguous(), shift.new_empty((*shift.shape, 2))
    # Queries first: they leave the pairs that the keys need.
    kernel.gradient_of_queries(dout, q, k, v, out, shift, starts, longest, dq, pair)
    kernel.gradient_of_keys(dout, q, k, v, pair, starts, longest, dk, dv)
    return dq, dk, dv


def side_by_side(x_RHC: Tensor) -> Tensor:
    """x, or a copy if its channels lie apart."""
    return x_RHC if x_RHC.stride(-1) == 1 else x_RHC.contiguous()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> Tensor:
        out: Tensor
        out, shift = _forward(q, k, v, starts, longest)
        ctx.save_for_backward(q, k, v, out, shift, starts)
        ctx.longest = longest
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, shift, starts = ctx.saved_tensors
        return *_backward(dout, q, k, v, out, shift, starts, ctx.longest), None, None


_packed_attention = custom_op("packed_attention")(_forward)
_packed_attention_backward = custom_op("packed_attention_backward")(_backward)


@_packed_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    rows, heads, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty((heads, rows), dtype=torch.float32)


@_packed_attention_backward.register_fake
def _(dout: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    out = rest[3]
    return torch.empty_like(out), torch.empty_like(out), torch.empty_like(out)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, starts, ctx.longest = inputs
    out, shift = output
    ctx.mark_non_differentiable(shift)
    ctx.save_for_backward(q, k, v, out, shift, starts)


def _of_the_op(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_packed_attention_backward(dout, *ctx.saved_tensors, ctx.longest), None, None


_packed_attention.register_autograd(_of_the_op, setup_context=_keep)
