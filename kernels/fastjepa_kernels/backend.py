"""Which implementation an op runs: its Triton kernel or its PyTorch twin.

Every op takes `backend`: "triton", "reference" (the twin), or "auto", the kernel for tensors on a
GPU and the twin elsewhere. A choice that cannot work raises. With `TRITON_INTERPRET=1` in the
environment before an op's first call, kernels run on the CPU in Triton's interpreter.

    choose("auto", torch.device("cuda"))  # Choice("triton", "...why")
"""

import functools
import importlib.util
import os
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "reference"]
NAMES: tuple[str, ...] = get_args(Backend)


@dataclass(frozen=True)
class Choice:
    """What runs, and why."""

    name: Literal["triton", "reference"]
    reason: str


@functools.cache
def _triton_is_here() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels would run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def choose(backend: str, device: torch.device) -> Choice:
    """The implementation for tensors on `device`.

    Raises ValueError for an unknown name, and for "triton" where no kernel can run.
    """
    if backend not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {backend}")
    if backend == "reference":
        return Choice("reference", "asked for")
    on_gpu = device.type == "cuda"
    if backend == "auto" and not on_gpu:
        return Choice("reference", f"tensors on {device.type} use the PyTorch twin")
    if not _triton_is_here():
        if backend == "auto":
            return Choice("reference", "triton is not installed")
        raise ValueError("backend: triton was asked for, and triton is not installed")
    if not on_gpu and not interpreted():
        raise ValueError(
            f"backend: triton needs CUDA tensors, got {device.type}; with TRITON_INTERPRET=1 "
            "it runs anywhere, slowly"
        )
    return Choice("triton", "asked for" if backend == "triton" else "tensors on a GPU")


def use_triton(backend: str, tensor: Tensor) -> bool:
    """Whether the kernel runs for `tensor`; raises as `choose` does."""
    return choose(backend, tensor.device).name == "triton"
