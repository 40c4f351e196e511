"""Exponential moving average of all tensors of a network at once, with a veto that needs no host
synchronisation.

A step of m = 0.99925 moves a weight by less than a bfloat16 can hold, so the average is kept in
float32; the half-precision copy that forwards run with is written in the same pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backend import Backend, interpreted, use_triton
from ..checks import reads_values
from ..library import custom_op

WIDE = (torch.float32, torch.float64)
HALF = (torch.bfloat16, torch.float16)


@torch.no_grad()
def ema_update(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    momentum: float | Tensor,
    *,
    copies: Sequence[Tensor] | None = None,
    veto: Tensor | None = None,
    veto_nonfinite: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """`target = m target + (1 - m) source`, in place, for all tensors (docs/method.md section 6).

    targets: float32 or float64, without gaps in memory. sources: the same shapes in the same
    order; float32, bfloat16 or float16, or float64 where the target is; at best with the target's
    strides (others are copied first). momentum: a number, or a 0-d float32 or float64 tensor on
    the targets' device (a schedule under torch.compile without recompiling); m = 1 leaves every
    bit. copies: bfloat16 or float16 tensors, laid out like the targets, that receive the result
    in the same pass. veto: a tensor of one element, non-zero where nothing may change.
    veto_nonfinite: nothing changes either if any source holds an infinity or NaN; reads the
    sources once more. Neither makes the host wait.

    Returns a 0-d int32 tensor on the device: 1 if the update was vetoed, else 0. Raises
    ValueError for what does not fit; m outside [0, 1] in a tensor where values may be looked at
    (checks.py). The kernel takes float32 targets; "auto" leaves float64 to the twin.
    """
    copies = _check_tensors(targets, sources, copies)
    device = targets[0].device
    if veto is not None and (veto.numel() != 1 or veto.device != device):
        raise ValueError(
            f"veto: expected one element on {device}, got {tuple(veto.shape)} on {veto.device}"
        )
    number, scheduled = 1.0, None
    if isinstance(momentum, Tensor):
        if momentum.ndim or momentum.dtype not in WIDE or momentum.device != device:
            raise ValueError(
                f"momentum: expected a 0-d float32 or float64 tensor on {device}, "
                f"got {momentum.dtype} {tuple(momentum.shape)} on {momentum.device}"
            )
        scheduled = momentum
    else:
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"momentum: expected a value in [0, 1], got {momentum}")
        number = float(momentum)
    vetoed: Tensor = _ema_update(
        list(targets), list(sources), list(copies), number, scheduled, veto, veto_nonfinite, backend
    )
    return vetoed


def _check_tensors(
    targets: Sequence[Tensor], sources: Sequence[Tensor], copies: Sequence[Tensor] | None
) -> Sequence[Tensor]:
    """Refuses what does not fit; returns the copies, none if there are none."""
    if not targets:
        raise ValueError("targets: expected at least one tensor, got none")
    for name, tensors in (("sources", sources), ("copies", copies)):
        if tensors is not None and len(tensors) != len(targets):
            raise ValueError(f"{name}: expected {len(targets)} tensors, got {len(tensors)}")
    device = targets[0].device
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        if target.dtype not in WIDE or target.device != device or not _is_dense(target):
            raise ValueError(
                f"targets[{i}]: expected float32 or float64 on {device} without gaps in memory, "
                f"got {target.dtype} on {target.device} with strides {target.stride()}"
            )
        fits = source.dtype in (torch.float32, *HALF, target.dtype)
        if source.shape != target.shape or source.device != device or not fits:
            raise ValueError(
                f"sources[{i}]: expected shape {tuple(target.shape)} on {device}, no wider than "
                f"{target.dtype}, got {source.dtype} {tuple(source.shape)} on {source.device}"
            )
    copies = copies or ()
    for i, (copy, target) in enumerate(zip(copies, targets, strict=False)):
        alike = copy.shape == target.shape and _same_layout(copy, target)
        if copy.dtype not in HALF or copy.device != device or not alike:
            raise ValueError(
                f"copies[{i}]: expected bfloat16 or float16 {tuple(target.shape)} with strides "
                f"{target.stride()} on {device}, got {copy.dtype} {tuple(copy.shape)} with "
                f"strides {copy.stride()} on {copy.device}"
            )
    return copies


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a stretch of memory, in any order of the axes."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(_layout(tensor)):
        if stride != expected:
            return False
        expected *= size
    return True


def _same_layout(one: Tensor, other: Tensor) -> bool:
    return one.stride() == other.stride() or _layout(one) == _layout(other)


def _layout(tensor: Tensor) -> list[tuple[int, int]]:
    """Stride and size of the axes that decide where an element lies."""
    if tensor.numel() == 0:
        return []
    return [(t, n) for t, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1]


@custom_op("ema_update", mutates=("targets", "copies"))
def _ema_update(
    targets: list[Tensor],
    sources: list[Tensor],
    copies: list[Tensor],
    momentum: float,
    scheduled: Tensor | None,
    veto: Tensor | None,
    veto_nonfinite: bool,
    backend: str,
) -> Tensor:
    if scheduled is not None and reads_values(scheduled) and not 0.0 <= float(scheduled) <= 1.0:
        raise ValueError(f"momentum: expected a value in [0, 1], got {float(scheduled)}")
    narrow = all(target.dtype == torch.float32 for target in targets)
    if backend == "triton" and not narrow:
        raise ValueError("targets: the kernel takes float32, got float64; the twin takes both")
    if use_triton(backend, targets[0]) and narrow:
        if interpreted() and targets[0].is_cuda:
            raise ValueError("backend: the interpreter cannot follow addresses on a GPU")
        from . import kernel

        alike = [_laid_out_like(t, s) for t, s in zip(targets, sources, strict=True)]
        return kernel.ema_update(targets, alike, copies, momentum, scheduled, veto, veto_nonfinite)
    stop = targets[0].new_zeros((), dtype=torch.bool)
    if veto is not None:
        stop = veto.reshape(()) != 0
    if veto_nonfinite:
        stop = stop | ~torch.stack([source.isfinite().all() for source in sources]).all()
    if targets[0].device.type == "cpu":
        momentum = momentum if scheduled is None else float(scheduled)
        _mix_on_host(targets, sources, copies, momentum, bool(stop))
    else:
        if scheduled is None:
            scheduled = torch.full((), momentum, dtype=torch.float64, device=stop.device)
        _mix_on_device(targets, sources, copies, scheduled.double(), stop)
    return stop.to(torch.int32)


@_ema_update.register_fake
def _(targets: list[Tensor], *rest: Any) -> Tensor:
    return targets[0].new_empty((), dtype=torch.int32)


def _laid_out_like(target: Tensor, source: Tensor) -> Tensor:
    if _same_layout(source, target):
        return source
    return torch.empty_like(target, dtype=source.dtype).copy_(source)


def _mix_on_host(
    targets: list[Tensor], sources: list[Tensor], copies: list[Tensor], momentum: float, stop: bool
) -> None:
    if stop:
        return
    share = 1.0 - momentum
    widened = [s.to(t.dtype) for t, s in zip(targets, sources, strict=True)]
    if 0.0 < share < 0.5:
        torch._foreach_lerp_(targets, widened, share)
    elif share >= 0.5:
        for target, source in zip(targets, widened, strict=True):
            torch.lerp(source, target, momentum, out=target)
    if copies:
        torch._foreach_copy_(copies, targets)


def _mix_on_device(
    targets: list[Tensor],
    sources: list[Tensor],
    copies: list[Tensor],
    momentum: Tensor,
    stop: Tensor,
) -> None:
    """The same where the host may not look at the veto: what must stay is written back."""
    share = 1.0 - momentum
    stays = stop | (share == 0.0)
    for target, source in zip(targets, sources, strict=True):
        wide = source.to(target.dtype)
        near, far = (target.lerp(wide, share.to(wide)), wide.lerp(target, momentum.to(wide)))
        target.copy_(torch.where(stays, target, torch.where(share < 0.5, near, far)))
    for copy, target in zip(copies, targets, strict=False):
        copy.copy_(torch.where(stop, copy, target.to(copy.dtype)))
