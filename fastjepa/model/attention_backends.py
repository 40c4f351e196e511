"""Exact attention by every library that may be at hand, each behind `(q, k, v, segments) -> out`.

None is causal, all scale by C^-0.5. PyTorch's own and the formula go through the segments one by
one; the others take the packed rows as they lie, with the places where sequences begin. Which one
can work where is `Backend.refusal`'s to say; attention.py chooses.

Shapes: R packed rows, B sequences, K tokens of a sequence, H heads, C head channels.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend as Sdpa
from torch.nn.attention import sdpa_kernel

from fastjepa.model.attention_cpu import Avx512
from fastjepa.model.segments import Segment, packed
from fastjepa_kernels.packed_attention import avx512

_HALF = (torch.float16, torch.bfloat16)

Run = Callable[[Tensor, Tensor, Tensor, Sequence[Segment]], Tensor]
Refusal = Callable[[torch.device, torch.dtype, int], str | None]


@dataclass(frozen=True)
class Backend:
    """One way to attend; `run` takes q, k and v [R, H, C] to [R, H, C]. It imports `module`.

    It is built for GPUs of a compute capability of `capability` or more, but less than `below`.
    `plans`: it prepares itself for every new length, which takes longer than a step can spare.
    `refuses`: what knows better than these where it runs.
    """

    name: str
    run: Run
    module: str = "torch"
    needs_cuda: bool = True
    dtypes: tuple[torch.dtype, ...] = _HALF
    capability: tuple[int, int] = (8, 0)
    below: tuple[int, int] | None = None
    channels: tuple[int, int, int] = (8, 256, 8)
    plans: bool = False
    refuses: Refusal | None = None

    def refusal(self, device: torch.device, dtype: torch.dtype, channels: int) -> str | None:
        """Why it cannot take heads of `channels` channels there; None if it can."""
        if not _found(self.module):
            return f"{self.module} is not installed"
        if self.refuses is not None:
            return self.refuses(device, dtype, channels)
        if not self.needs_cuda:
            return None
        if device.type != "cuda":
            return f"it needs a CUDA device, not {device.type}"
        found = torch.cuda.get_device_capability(device)
        if found < self.capability:
            return "it needs compute capability {}.{} or more".format(*self.capability)
        if self.below is not None and found >= self.below:
            return "it is not built for compute capability {}.{} and more".format(*self.below)
        if dtype not in self.dtypes:
            return f"it takes {' and '.join(str(d)[6:] for d in self.dtypes)}, not {str(dtype)[6:]}"
        low, high, step = self.channels
        if not low <= channels <= high or channels % step:
            return f"it takes heads of {low} to {high} channels in steps of {step}, not {channels}"
        return None


@lru_cache
def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # of a package around it
        return False


@lru_cache(maxsize=16)
def sequence_starts(segments: tuple[Segment, ...], device: torch.device) -> Tensor:
    """First row of every sequence and the end of the last: int32 [B + 1], ascending.

    All blocks of a pass share one. It is counted on the device, so nothing waits for a copy.
    """
    with torch.inference_mode(False):  # a cached tensor may meet a gradient later
        starts = [
            torch.arange(s.start, s.stop, s.length, dtype=torch.int32, device=device)
            for s in segments
        ]
        end = torch.full((1,), segments[-1].stop, dtype=torch.int32, device=device)
        return torch.cat([*starts, end])


def by_segment(kernel: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Run:
    """A backend of a kernel for [B, H, K, C], one segment after the other."""

    def run(q_RHC: Tensor, k_RHC: Tensor, v_RHC: Tensor, segments: Sequence[Segment]) -> Tensor:
        # Their gradients come together in one copy.
        sizes = [segment.count * segment.length for segment in segments]
        sides = zip(*(x.split(sizes) for x in (q_RHC, k_RHC, v_RHC)), strict=True)
        parts = []
        for segment, side in zip(segments, sides, strict=True):
            shape = segment.count, segment.length, *q_RHC.shape[1:]
            q, k, v = (x.view(shape).transpose(1, 2) for x in side)
            parts.append(kernel(q, k, v).transpose(1, 2).flatten(0, 1))
        return packed(parts)

    return run


def _sdpa(q_BHKC: Tensor, k_BHKC: Tensor, v_BHKC: Tensor) -> Tensor:
    if q_BHKC.device.type != "cuda":
        return F.scaled_dot_product_attention(q_BHKC, k_BHKC, v_BHKC)
    # Left to itself it takes cuDNN's, which is a backend of its own.
    with sdpa_kernel([Sdpa.FLASH_ATTENTION, Sdpa.EFFICIENT_ATTENTION, Sdpa.MATH]):
        return F.scaled_dot_product_attention(q_BHKC, k_BHKC, v_BHKC)


def _avx512(q_BHKC: Tensor, k_BHKC: Tensor, v_BHKC: Tensor) -> Tensor:
    out: Tensor = Avx512.apply(q_BHKC, k_BHKC, v_BHKC)  # type: ignore[no-untyped-call]
    return out


def _cudnn(q_BHKC: Tensor, k_BHKC: Tensor, v_BHKC: Tensor) -> Tensor:
    with sdpa_kernel(Sdpa.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q_BHKC, k_BHKC, v_BHKC)


def _formula(q_BHKC: Tensor, k_BHKC: Tensor, v_BHKC: Tensor) -> Tensor:
    scores = q_BHKC @ k_BHKC.transpose(-1, -2) * q_BHKC.shape[-1] ** -0.5
    out: Tensor = scores.softmax(-1) @ v_BHKC
    return out


def _places(device: torch.device, segments: Sequence[Segment]) -> tuple[Tensor, int]:
    starts = sequence_starts(tuple(segments), device)
    return starts, max(segment.length for segment in segments)


def _varlen(q_RHC: Tensor, k_RHC: Tensor, v_RHC: Tensor, segments: Sequence[Segment]) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    starts, longest = _places(q_RHC.device, segments)
    out = varlen_attn(q_RHC, k_RHC, v_RHC, starts, starts, longest, longest)
    assert isinstance(out, Tensor)
    return out


def _triton(q_RHC: Tensor, k_RHC: Tensor, v_RHC: Tensor, segments: Sequence[Segment]) -> Tensor:
    from fastjepa_kernels import packed_attention

    return packed_attention(q_RHC, k_RHC, v_RHC, *_places(q_RHC.device, segments))


def _flash2(q_RHC: Tensor, k_RHC: Tensor, v_RHC: Tensor, segments: Sequence[Segment]) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    starts, longest = _places(q_RHC.device, segments)
    out: Tensor = flash_attn_varlen_func(q_RHC, k_RHC, v_RHC, starts, starts, longest, longest)
    return out


def _flash3(q_RHC: Tensor, k_RHC: Tensor, v_RHC: Tensor, segments: Sequence[Segment]) -> Tensor:
    from flash_attn_interface import flash_attn_varlen_func

    starts, longest = _places(q_RHC.device, segments)
    return _first(flash_attn_varlen_func(q_RHC, k_RHC, v_RHC, starts, starts, longest, longest))


def _flash4(q_RHC: Tensor, k_RHC: Tensor, v_RHC: Tensor, segments: Sequence[Segment]) -> Tensor:
    from flash_attn.cute import flash_attn_varlen_func

    starts, longest = _places(q_RHC.device, segments)
    return _first(
        flash_attn_varlen_func(
            q_RHC, k_RHC, v_RHC, cu_seqlens_q=starts, cu_seqlens_k=starts,
            max_seqlen_q=longest, max_seqlen_k=longest,
        )
    )  # fmt: skip


def _first(answer: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The output alone: some versions give the log-sum-exp with it."""
    return answer[0] if isinstance(answer, tuple) else answer


def _xformers(q_RHC: Tensor, k_RHC: Tensor, v_RHC: Tensor, segments: Sequence[Segment]) -> Tensor:
    from xformers.ops import memory_efficient_attention

    q, k, v = (t[None] for t in (q_RHC, k_RHC, v_RHC))
    diagonal = _block_diagonal(tuple(segments), q_RHC.device)
    out: Tensor = memory_efficient_attention(q, k, v, attn_bias=diagonal)[0]
    return out


@lru_cache(maxsize=16)
def _block_diagonal(segments: tuple[Segment, ...], device: torch.device) -> object:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    lengths = [segment.length for segment in segments for _ in range(segment.count)]
    with torch.inference_mode(False):
        return BlockDiagonalMask.from_seqlens(lengths, device=device)


ALL = (
    Backend("avx512", by_segment(_avx512), needs_cuda=False, refuses=avx512.refusal),
    Backend("sdpa", by_segment(_sdpa), needs_cuda=False),
    Backend("cudnn", by_segment(_cudnn), channels=(8, 128, 8), plans=True),
    Backend("triton", _triton, "triton", channels=(16, 128, 8)),
    Backend("varlen", _varlen),
    Backend("flash2", _flash2, "flash_attn.flash_attn_interface"),
    Backend("flash3", _flash3, "flash_attn_interface", capability=(9, 0), below=(10, 0)),
    Backend("flash4", _flash4, "flash_attn.cute", capability=(9, 0), channels=(8, 128, 8)),
    Backend(
        "xformers", _xformers, "xformers",
        dtypes=(*_HALF, torch.float32), capability=(7, 0), channels=(8, 128, 8),
    ),
    Backend("math", by_segment(_formula), needs_cuda=False),
)  # fmt: skip
