"""How fast this processor multiplies matrices: what model FLOPs utilisation on a CPU is a share
of."""

import time

import torch

_SIDE, _SECONDS = 768, 0.1


def matrix_rate(dtype: torch.dtype) -> float:
    """Operations a second of square products in `dtype` with PyTorch's threads, the best of a
    tenth of a second."""
    left, right = (torch.ones(_SIDE, _SIDE, dtype=dtype) for _ in range(2))
    left @ right  # the first one sets up
    best, until = float("inf"), time.perf_counter() + _SECONDS
    while True:
        started = time.perf_counter()
        left @ right
        ended = time.perf_counter()
        best = min(best, ended - started)
        if ended >= until:
            return 2 * _SIDE**3 / best
