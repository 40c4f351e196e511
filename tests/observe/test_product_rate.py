"""The rate that utilisation on a CPU is a share of: that of PyTorch's own product."""

import time

import pytest
import torch

from fastjepa.observe.product_rate import product_rate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_product_is_faster_by_far(dtype: torch.dtype) -> None:
    left, right = (torch.ones(256, 256, dtype=dtype) for _ in range(2))
    started = time.perf_counter()
    left @ right
    seconds = time.perf_counter() - started
    assert product_rate(dtype) > 0.1 * 2 * 256**3 / seconds
