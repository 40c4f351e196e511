"""Checks of tensors' values, which an op makes before it launches anything.

Shapes and dtypes are checked always. Values are, on the CPU; on a GPU reading them would make
the host wait, so there they are only with `FASTJEPA_KERNELS_DEBUG=1` in the environment.
"""

import os

import torch
from torch import Tensor

INDEX_DTYPES = (torch.int32, torch.int64)


def reads_values(tensor: Tensor) -> bool:
    """Whether the values of `tensor` may be looked at."""
    return tensor.device.type == "cpu" or os.environ.get("FASTJEPA_KERNELS_DEBUG", "0") == "1"


def check_same_device(**tensors: Tensor | None) -> None:
    """Raises ValueError unless all tensors live on the first one's device."""
    there = [(name, t.device) for name, t in tensors.items() if t is not None]
    for name, device in there[1:]:
        if device != there[0][1]:
            raise ValueError(
                f"{name}: expected a tensor on {there[0][1]} like {there[0][0]}, got {device}"
            )


def check_in_range(name: str, index: Tensor, size: int, what: str) -> None:
    """Raises ValueError if an index lies outside 0..size-1, where values may be looked at."""
    if not reads_values(index) or index.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(index))
    if low < 0 or high >= size:
        raise ValueError(f"{name}: indices {low}..{high} leave {what} of {size}")
