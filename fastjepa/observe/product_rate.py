"""How fast this processor multiplies matrices, found in a moment at a run's start: what model FLOPs
utilisation on a CPU is a share of. `fastjepa bench step` takes its time for the same question.
"""

import time

import torch

from fastjepa_kernels.precision import as_multiplied

_SIDES, _SECONDS = (128, 256, 512, 768), 0.1


def product_rate(dtype: torch.dtype) -> float:
    """Operations a second of square products of `dtype` with PyTorch's threads, multiplied in what
    is fast here: the best of about a tenth of a second, in which a slow processor comes to smaller
    ones only."""
    best, until = 0.0, time.perf_counter() + _SECONDS
    for side in _SIDES:
        left, right = (as_multiplied(torch.ones(side, side, dtype=dtype)) for _ in range(2))
        left @ right  # the first one sets up
        for _ in range(4):
            started = time.perf_counter()
            left @ right
            ended = time.perf_counter()
            best = max(best, 2 * side**3 / (ended - started))
            if ended >= until:
                return best
    return best
