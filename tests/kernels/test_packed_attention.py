"""Attention over packed sequences: kernel and twin against the formula in float64, its gradients,
any lengths and strides, same bits twice, bad input."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastjepa_kernels import packed_attention
from fastjepa_kernels.packed_attention import kernel, op, reference
from fastjepa_kernels.packed_attention.kernel import Tile, Tiles
from fastjepa_kernels.packed_attention.op import _packed_attention, _packed_attention_backward

SMALL = Tiles(Tile(16, 32, 4, 2), Tile(32, 16, 4, 2), Tile(16, 32, 4, 2))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that few rows fill several tiles, and errors are no larger than float32's."""
    monkeypatch.setattr(kernel, "tiles_for", lambda _: SMALL)
    monkeypatch.setattr(op, "KERNEL_DTYPES", [torch.float32, *op.KERNEL_DTYPES])


def starts_of(lengths: list[int], device: torch.device) -> Tensor:
    places = torch.tensor([0, *lengths]).cumsum(0)
    return places.to(torch.int32).to(device)


def packed(rows: int, heads: int, channels: int, device: torch.device) -> Tensor:
    """Numbers of a size that the softmax neither levels nor lets one key win."""
    return torch.randn(rows, 3, heads, channels, dtype=torch.float64, device=device) * 1.5


def values_and_gradients(
    attend: Callable[..., Tensor], qkv_R3HC: Tensor, upstream_RHC: Tensor
) -> tuple[Tensor, Tensor]:
    leaf = qkv_R3HC.detach().requires_grad_()
    out = attend(*leaf.unbind(1))
    assert out.is_contiguous()
    (grad,) = torch.autograd.grad(out, leaf, upstream_RHC.to(out.dtype))
    return out.detach(), grad


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(
        st.one_of(st.integers(0, 50), st.sampled_from([1, 16, 31, 32, 33, 64])),
        min_size=1, max_size=3,
    ),
    heads=st.integers(1, 2),
    channels=st.sampled_from([16, 24, 32, 40, 64, 80, 128]),
    more=st.integers(0, 40),
)  # fmt: skip
@pytest.mark.usefixtures("small_tiles")
def test_values_and_gradients_are_those_of_the_formula(
    lengths: list[int], heads: int, channels: int, more: int, backend: str, device: torch.device
) -> None:
    starts, rows = starts_of(lengths, device), sum(lengths)
    exact = packed(rows, heads, channels, device)
    upstream = torch.randn(rows, heads, channels, dtype=torch.float64, device=device)
    found = values_and_gradients(
        lambda *x: packed_attention(*x, starts, max(lengths) + more, backend=backend),
        exact.float(), upstream,
    )  # fmt: skip
    expected = values_and_gradients(
        lambda *x: reference.packed_attention(*x, starts), exact.float().double(), upstream.float()
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-5)
