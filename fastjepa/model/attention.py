"""Attention behind one call: interchangeable exact backends over a packed batch.

`auto` measures: the first pass of a size times every backend that can take it, and keeps the
fastest for the rest of the process. Lengths change with every mask, so a size is coarse: as many
sequences, the longest rounded up to a multiple of 256, the rows to a power of two.
cuDNN's plan of a new length takes as long as many passes: it is for lengths that recur.

Shapes: R packed rows, B sequences, K tokens of a sequence, H heads, C head channels.
"""

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fastjepa.model.attention_backends import ALL, Backend
from fastjepa.model.segments import Segment
from fastjepa_kernels.grid import cdiv, next_power_of_2

BACKENDS = ("auto", *(backend.name for backend in ALL))
_STEP = 256
_ROUNDS = 5
# Lengths for which a backend may prepare itself; more than these are those of changing masks.
_PLANS = 4

_Size = tuple[object, ...]
_fastest: dict[_Size, Backend] = {}
_lengths: dict[_Size, set[tuple[Segment, ...]]] = {}


def attend(
    q_RHC: Tensor,
    k_RHC: Tensor,
    v_RHC: Tensor,
    segments: Sequence[Segment],
    *,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention of each sequence on itself, not causal, scale C^-0.5: [R, H, C] each, and
    the result.

    Backends are those of attention_backends.py; `auto` takes the fastest here. Raises ValueError
    for another name, and for one that cannot take these inputs on their device.
    """
    if backend == "auto":
        return fastest(q_RHC, segments).run(q_RHC, k_RHC, v_RHC, segments)
    chosen = backend_named(backend)
    refusal = chosen.refusal(q_RHC.device, q_RHC.dtype, q_RHC.shape[-1])
    if refusal is not None:
        raise ValueError(f"attention: {chosen.name} cannot run here: {refusal}")
    return chosen.run(q_RHC, k_RHC, v_RHC, segments)


def backend_named(name: str) -> Backend:
    """The backend of a name other than `auto`. Raises ValueError for one that there is not."""
    for backend in ALL:
        if backend.name == name:
            return backend
    raise ValueError(f"attention: expected one of {', '.join(BACKENDS)}, got {name!r}")


def candidates(device: torch.device, dtype: torch.dtype, channels: int) -> list[Backend]:
    """What `auto` chooses from, on a CPU what is faster at every size. The formula is slow
    everywhere: not in it."""
    able = [
        backend
        for backend in ALL
        if backend.name != "math" and backend.refusal(device, dtype, channels) is None
    ]
    return able[:1] if device.type == "cpu" else able


def fastest(q_RHC: Tensor, segments: Sequence[Segment]) -> Backend:
    """The backend that took least time on this size, with its gradient if one is asked for.

    One that prepares itself for every length is left out once there have been too many.
    """
    device, (_, heads, channels) = q_RHC.device, q_RHC.shape
    grad = torch.is_grad_enabled() and q_RHC.requires_grad
    kind = device, q_RHC.dtype, heads, channels, grad
    seen = _lengths.setdefault(kind, set())
    if len(seen) <= _PLANS:
        seen.add(tuple(segments))
    plans = len(seen) <= _PLANS
    size = *kind, plans, *_size(segments)
    if size not in _fastest:
        able = candidates(device, q_RHC.dtype, channels)
        able = [backend for backend in able if plans or not backend.plans]
        _fastest[size] = able[0] if len(able) == 1 else _measured_here(able, q_RHC, segments, grad)
    return _fastest[size]


def _measured_here(
    able: Sequence[Backend], q_RHC: Tensor, segments: Sequence[Segment], grad: bool
) -> Backend:
    rows, heads, channels = q_RHC.shape
    with _unwatched():
        like = torch.randn(
            (rows, 3, heads, channels), dtype=q_RHC.dtype, device=q_RHC.device,
            generator=torch.Generator(q_RHC.device).manual_seed(0),
        ).requires_grad_(grad)  # fmt: skip
        return measured(able, like, segments)


def _size(segments: Sequence[Segment]) -> _Size:
    longest = cdiv(max(segment.length for segment in segments), _STEP) * _STEP
    sequences = sum(segment.count for segment in segments)
    return len(segments), sequences, longest, next_power_of_2(segments[-1].stop)


@contextmanager
def _unwatched() -> Iterator[None]:
    """Outside of what watches a pass: checkpointing counts the tensors that a block keeps and the
    operations that it runs, and a block that runs again does not measure again."""

    def same(tensor: Tensor) -> Tensor:
        return tensor

    with _disable_current_modes(), torch.autograd.graph.saved_tensors_hooks(same, same):
        yield


def measured(able: Sequence[Backend], qkv_R3HC: Tensor, segments: Sequence[Segment]) -> Backend:
    """The one of `able` whose quickest of some rounds, taken in turn, is the quickest.

    One that fails, as a package built for other cards does, is left out with a warning; the last
    one's error is raised.
    """
    able, times = list(able), {backend.name: float("inf") for backend in able}
    for number in range(_ROUNDS + 1):
        for backend in tuple(able):
            try:
                seconds = _seconds(backend, qkv_R3HC, segments)
            except torch.OutOfMemoryError:
                continue
            except (ImportError, RuntimeError) as error:
                able.remove(backend)
                if not able:
                    raise
                reason = str(error).strip().partition("\n")[0]
                warnings.warn(f"attention: {backend.name} is left out: {reason}", stacklevel=2)
                continue
            if number:  # the first compiles and warms up
                times[backend.name] = min(times[backend.name], seconds)
    return min(able, key=lambda backend: times[backend.name])


def _seconds(backend: Backend, qkv_R3HC: Tensor, segments: Sequence[Segment]) -> float:
    _wait(qkv_R3HC.device)
    start = time.perf_counter()
    with torch.set_grad_enabled(qkv_R3HC.requires_grad):
        q, k, v = qkv_R3HC.unbind(1)
        out = backend.run(q, k, v, segments)
    if qkv_R3HC.requires_grad:
        torch.autograd.grad(out, qkv_R3HC, torch.ones_like(out))
    _wait(qkv_R3HC.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
