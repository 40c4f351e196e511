"""The dtype that ops compute and add up in, and what a processor has for it."""

from functools import lru_cache

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for all else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@lru_cache(maxsize=1)
def wide_vectors() -> bool:
    """Whether the processor has AVX-512; those that do have 1 MiB of second-level cache or more."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


@lru_cache(maxsize=1)
def multiplies_bfloat16() -> bool:
    """Whether this processor has the instructions that products in bfloat16 need (AVX-512, or
    AVX-NE-CONVERT) and oneDNN, which uses them, is there: it is not on a Mac."""
    onednn = torch.backends.mkldnn.is_available()
    return onednn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def as_multiplied(x: Tensor) -> Tensor:
    """x in the dtype in which its products are fast: float32 for bfloat16 on a processor that
    would multiply it six times as slowly, itself elsewhere."""
    slow = x.dtype == torch.bfloat16 and x.device.type == "cpu" and not multiplies_bfloat16()
    return x.float() if slow else x
