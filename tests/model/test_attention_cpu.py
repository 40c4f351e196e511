"""Attention on a CPU against plain attention, short and long, in every precision."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastjepa.model import attention_cpu, attention_products
from fastjepa.model.attention_cpu import (
    LONG,
    LONG_IN_BFLOAT16,
    attention_dtype,
    backward,
    forward,
)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


def normal(*shape: int, deviation: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * deviation


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("length", "split"),
    [(1, True), (5, True), (300, True), (LONG - 1, True), (LONG, True), (LONG + 130, True),
     (LONG + 130, False)],
)  # fmt: skip
def test_values_and_gradients_are_those_of_plain_attention(
    length: int, split: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_cpu, "wide_vectors", lambda: split)
    q, k, v, upstream = (normal(1, 2, length, 8, seed=seed) for seed in range(4))
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    exact = plain(*leaves)
    exact_grads = torch.autograd.grad(exact, leaves, upstream)

    narrow = [t.to(dtype) for t in (q, k, v)]
    out, lse = forward(*narrow)
    grads = backward(upstream.to(dtype), *narrow, out, lse)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5}[dtype]
    for ours, theirs in zip((out, *grads), (exact, *exact_grads), strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).abs().max() <= tolerance * theirs.abs().max().clamp_min(1.0)


@pytest.mark.parametrize(("length", "split"), [(300, True), (LONG + 130, True), (1000, False)])
def test_in_float32_it_is_as_exact_as_pytorchs_own(
    length: int, split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_cpu, "wide_vectors", lambda: split)
    q, k, v, upstream = (normal(1, 2, length, 16, seed=seed).float() for seed in range(4))
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    exact = torch.autograd.grad(plain(*wide), wide, upstream.double())
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    sdpa = torch.autograd.grad(F.scaled_dot_product_attention(*leaves), leaves, upstream)
    ours = backward(upstream, q, k, v, *forward(q, k, v))
    for grad, grad_ref, grad_exact in zip(ours, sdpa, exact, strict=True):
        error, error_ref = ((g.double() - grad_exact).norm() for g in (grad, grad_ref))
        assert error <= 2 * error_ref + 1e-7 * grad_exact.norm()


# Sequences all at once and two at a time, heads eight and two at a time, uneven cuts of the tokens,
# and sums that leave a rest.
@pytest.mark.parametrize(
    ("batch", "heads", "length"), [(3, 3, 97), (3, 2, 700), (1, 9, 511), (2, 3, 1451), (1, 1, 1030)]
)
@pytest.mark.parametrize("deviation", [0.1, 1.0, 2.0])
@pytest.mark.parametrize("channels", [16, 64])
def test_in_bfloat16_it_is_as_exact_as_the_formula(
    channels: int, deviation: float, batch: int, heads: int, length: int
) -> None:
    shape = (batch, heads, length, channels)
    q, k = (normal(*shape, deviation=deviation**0.5, seed=seed) for seed in (0, 1))
    v, upstream = (normal(*shape, seed=seed) for seed in (2, 3))
    wide = [t.clone().requires_grad_() for t in (q, k, v)]
    exact = plain(*wide)
    exact_grads = torch.autograd.grad(exact, wide, upstream)

    narrow = [t.bfloat16() for t in (q, k, v)]
    same = [t.clone().requires_grad_() for t in narrow]
    formula = plain(*same)
    formula_grads = torch.autograd.grad(formula, same, upstream.bfloat16())
    # Gradients come in the layout of the block: tokens before heads.
    laid_out = upstream.bfloat16().transpose(1, 2).contiguous().transpose(1, 2)
    assert attention_products.scores_are_small(*narrow[:2])
    out, lse = attention_products.forward(*narrow)
    grads = attention_products.backward(laid_out, *narrow, out, lse)
    scores = narrow[0].double() @ narrow[1].double().mT * channels**-0.5
    assert (lse - scores.logsumexp(-1)).abs().max() <= 2**-8 * scores.abs().max() + 1e-3
    for ours, theirs, truth in zip(
        (out, *grads), (formula, *formula_grads), (exact, *exact_grads), strict=True
    ):
        assert ours.dtype == torch.bfloat16
        error, error_ref = ((t.double() - truth).norm() for t in (ours, theirs))
        assert error <= 1.5 * error_ref + 2e-3 * truth.norm()


def test_scores_too_large_for_an_exponential_take_the_flash_kernel() -> None:
    q, k, v = (normal(1, 2, 600, 16, seed=seed).bfloat16() for seed in range(3))
    q, k = q * 8, k * 8
    assert not attention_products.scores_are_small(q, k)
    out, lse = forward(q, k, v)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v))
    assert lse.isfinite().all()
    assert all(grad.isfinite().all() for grad in backward(torch.ones_like(out), q, k, v, out, lse))
    q[0, 0, 0, 0] = torch.nan
    assert not attention_products.scores_are_small(q, k)


@pytest.mark.parametrize("able", [False, True])
def test_bfloat16_runs_in_float32_where_that_is_faster(
    able: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On short sequences, and on a processor without products in bfloat16."""
    monkeypatch.setattr(attention_cpu, "multiplies_bfloat16", lambda: able)
    assert attention_dtype(torch.bfloat16, 10) == torch.float32
    long = attention_dtype(torch.bfloat16, LONG_IN_BFLOAT16)
    assert long == (torch.bfloat16 if able else torch.float32)
    assert attention_dtype(torch.float32, LONG) == torch.float32
    assert attention_dtype(torch.float64, 10) == torch.float64
