"""Rows that lie more than 2^31 elements apart: addresses take 64 bits.

The memory is only reserved; the pages that are touched are all it costs.
"""

import mmap

import pytest
import torch
from torch import Tensor

from fastjepa_kernels import dense_l1, packed_attention, rope3d, rope3d_

FAR = 2**31 + 16


def rows_far_apart(count: int, width: int, device: torch.device) -> Tensor:
    """[count, width] bfloat16 with a row stride beyond 32 bits."""
    elements = (count - 1) * FAR + width
    if device.type == "cuda":
        memory = torch.empty(elements, dtype=torch.bfloat16, device=device)
    else:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        memory = torch.frombuffer(mmap.mmap(-1, 2 * elements, flags=flags), dtype=torch.bfloat16)
    rows = memory.as_strided((count, width), (FAR, 1))
    return rows.copy_(torch.randn(count, width))


@pytest.fixture(autouse=True)
def _memory_is_not_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


def test_target_rows(backend: str, device: torch.device) -> None:
    target_MD = rows_far_apart(3, 48, device)
    z_RE = torch.randn(2, 48, device=device, requires_grad=True)
    row_R = torch.tensor([2, 1], device=device)
    total, _ = dense_l1(z_RE, [target_MD], row_R, [2], backend=backend)
    near, _ = dense_l1(z_RE, [target_MD.contiguous()], row_R, [2], backend=backend)
    assert torch.equal(total, near)


def test_predictions_and_their_gradient(backend: str, device: torch.device) -> None:
    z_RE = rows_far_apart(3, 48, device)
    close_RE = z_RE.contiguous().requires_grad_()
    z_RE.requires_grad_()
    target_MD, row_R = torch.randn(3, 48, device=device), torch.arange(3, device=device)
    for prediction in (z_RE, close_RE):
        dense_l1(prediction, [target_MD], row_R, [3], backend=backend)[0].backward()
    assert torch.equal(z_RE.grad, close_RE.grad)  # type: ignore[arg-type]


def test_queries_and_keys(backend: str, device: torch.device) -> None:
    qkv_N3HC = rows_far_apart(3, 3 * 2 * 8, device).unflatten(1, (3, 2, 8))
    angle = torch.rand(3, 4, device=device)
    table = torch.stack((angle.cos(), angle.sin()), -1)
    expected = rope3d(qkv_N3HC.contiguous(), table, backend=backend)
    assert torch.equal(rope3d(qkv_N3HC, table, backend=backend), expected)
    rope3d_(qkv_N3HC, table, backend=backend)
    assert torch.equal(qkv_N3HC, expected)


def test_attention(backend: str, device: torch.device) -> None:
    rows_R3HC = rows_far_apart(3, 3 * 2 * 16, device).unflatten(1, (3, 2, 16))
    starts = torch.tensor([0, 3], dtype=torch.int32, device=device)
    results = []
    for qkv_R3HC in (rows_R3HC, rows_R3HC.contiguous()):
        q, k, v = (x.detach().requires_grad_() for x in qkv_R3HC.unbind(1))
        out = packed_attention(q, k, v, starts, 3, backend=backend)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
    for far, near in zip(*results, strict=True):
        torch.testing.assert_close(far, near, rtol=0, atol=0 if backend == "triton" else 0.02)
