"""The CPU's flash kernels against plain attention, short and long."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastjepa.model.attention_cpu import LONG, attention_dtype, flash_backward, flash_forward


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("length", [1, 5, 300, LONG - 1, LONG, LONG + 130])
def test_values_and_gradients_are_those_of_plain_attention(length: int, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 2, length, 8, dtype=torch.float64) for _ in range(3))
    upstream = torch.randn(1, 2, length, 8, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    exact = plain(*leaves)
    exact_grads = torch.autograd.grad(exact, leaves, upstream)

    narrow = [t.to(dtype) for t in (q, k, v)]
    out, lse = flash_forward(*narrow)
    grads = flash_backward(upstream.to(dtype), *narrow, out, lse)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5}[dtype]
    for ours, theirs in zip((out, *grads), (exact, *exact_grads), strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).abs().max() <= tolerance * theirs.abs().max().clamp_min(1.0)


@pytest.mark.parametrize("length", [300, LONG + 130])
def test_in_float32_it_is_as_exact_as_pytorchs_own(length: int) -> None:
    q, k, v = (torch.randn(1, 2, length, 16) for _ in range(3))
    upstream = torch.randn_like(q)
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    exact = torch.autograd.grad(plain(*wide), wide, upstream.double())
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    sdpa = torch.autograd.grad(F.scaled_dot_product_attention(*leaves), leaves, upstream)
    ours = flash_backward(upstream, q, k, v, *flash_forward(q, k, v))
    for grad, grad_ref, grad_exact in zip(ours, sdpa, exact, strict=True):
        error, error_ref = ((g.double() - grad_exact).norm() for g in (grad, grad_ref))
        assert error <= 2 * error_ref + 1e-7 * grad_exact.norm()


def test_bfloat16_runs_in_float32_where_that_is_faster() -> None:
    assert attention_dtype(torch.bfloat16, 10) == torch.float32
    assert attention_dtype(torch.bfloat16, LONG) == torch.bfloat16
    assert attention_dtype(torch.float32, LONG) == torch.float32
    assert attention_dtype(torch.float64, 10) == torch.float64
