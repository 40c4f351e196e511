"""Measured on this process."""

import mmap

import pytest
import torch

from fastjepa.observe.memory import read_memory


def test_an_allocation_shows_and_its_peak_stays() -> None:
    before = read_memory()
    # Pages of its own: a tensor could get memory that earlier tests freed, resident already.
    block = mmap.mmap(-1, 64 * 2**20)
    for page in range(0, len(block), mmap.PAGESIZE):
        block[page] = 1
    during = read_memory()
    block.close()
    after = read_memory()
    assert during.resident - before.resident == pytest.approx(64 / 1024, abs=0.02)
    assert after.resident_peak >= during.resident - 0.02
    assert after.cuda_peak is None
    assert after.main == after.resident_peak


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_cuda_peak_is_the_allocators() -> None:
    block = torch.ones(2**20, device="cuda")
    reading = read_memory("cuda")
    assert reading.cuda_peak is not None
    assert reading.main == reading.cuda_peak >= block.numel() * 4 / 2**30
