"""Attention behind one call: interchangeable exact backends over a packed batch.

`auto` measures: the first pass of a shape times every backend that can take it, and keeps the
fastest for the rest of the process. Lengths change with every mask, so shapes count as one where
their lengths round up to the same multiple of 256.

Shapes: R packed rows, B sequences, K tokens of a sequence, H heads, C head channels.
"""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from fastjepa.model.attention_backends import ALL, Backend
from fastjepa.model.segments import Segment, segments_of

BACKENDS = ("auto", *(backend.name for backend in ALL))
_STEP = 256
_ROUNDS = 5

_Shape = tuple[object, ...]
_fastest: dict[_Shape, Backend] = {}


def attend(qkv_R3HC: Tensor, segments: Sequence[Segment], *, backend: str = "auto") -> Tensor:
    """Softmax attention of each sequence on itself, not causal, scale C^-0.5: [R, 3, H, C] -> [R,
    H, C].

    Backends are those of attention_backends.py; `auto` takes the fastest here. Raises ValueError
    for another name, and for one that cannot take these inputs on their device.
    """
    chosen = fastest(qkv_R3HC, segments) if backend == "auto" else backend_named(backend)
    refusal = chosen.refusal(qkv_R3HC.device, qkv_R3HC.dtype, qkv_R3HC.shape[-1])
    if refusal is not None:
        raise ValueError(f"attention: {chosen.name} cannot run here: {refusal}")
    return chosen.run(qkv_R3HC, segments)


def backend_named(name: str) -> Backend:
    """The backend of a name other than `auto`. Raises ValueError for one that there is not."""
    for backend in ALL:
        if backend.name == name:
            return backend
    raise ValueError(f"attention: expected one of {', '.join(BACKENDS)}, got {name!r}")


def candidates(device: torch.device, dtype: torch.dtype, channels: int) -> list[Backend]:
    """What `auto` chooses from, PyTorch's own first. The formula is slow everywhere: not in it."""
    return [
        backend
        for backend in ALL
        if backend.name != "math" and backend.refusal(device, dtype, channels) is None
    ]


def fastest(qkv_R3HC: Tensor, segments: Sequence[Segment]) -> Backend:
    """The backend that took least time on this shape, with its gradient if one is asked for."""
    device, (_, _, heads, channels) = qkv_R3HC.device, qkv_R3HC.shape
    able = candidates(device, qkv_R3HC.dtype, channels)
    if len(able) == 1:
        return able[0]
    grad = torch.is_grad_enabled() and qkv_R3HC.requires_grad
    sizes = tuple((s.count, -(-s.length // _STEP) * _STEP) for s in segments)
    shape = (device, qkv_R3HC.dtype, heads, channels, sizes, grad)
    if shape not in _fastest:
        like = torch.randn(
            sum(count * length for count, length in sizes), 3, heads, channels,
            dtype=qkv_R3HC.dtype, device=device, generator=torch.Generator(device).manual_seed(0),
        ).requires_grad_(grad)  # fmt: skip
        _fastest[shape] = measured(able, like, segments_of(sizes))
    return _fastest[shape]


def measured(able: Sequence[Backend], qkv_R3HC: Tensor, segments: Sequence[Segment]) -> Backend:
    """The one of `able` whose quickest of some rounds, taken in turn, is the quickest."""
    times = {backend.name: float("inf") for backend in able}
    for number in range(_ROUNDS + 1):
        for backend in able:
            try:
                seconds = _seconds(backend, qkv_R3HC, segments)
            except torch.OutOfMemoryError:
                continue
            if number:  # the first compiles and warms up
                times[backend.name] = min(times[backend.name], seconds)
    return min(able, key=lambda backend: times[backend.name])


def _seconds(backend: Backend, qkv_R3HC: Tensor, segments: Sequence[Segment]) -> float:
    _wait(qkv_R3HC.device)
    start = time.perf_counter()
    with torch.set_grad_enabled(qkv_R3HC.requires_grad):
        out = backend.run(qkv_R3HC, segments)
    if qkv_R3HC.requires_grad:
        torch.autograd.grad(out, qkv_R3HC, torch.ones_like(out))
    _wait(qkv_R3HC.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
