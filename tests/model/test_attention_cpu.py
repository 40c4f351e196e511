"""Attention on a CPU: PyTorch's against the formula, and when it is ours."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastjepa.model import attention_cpu
from fastjepa.model.attention_cpu import LARGEST_SUM, LONG, attention_dtype, backward, forward
from fastjepa_kernels.packed_attention import avx512


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [8.0, -8.0])
def test_scores_too_large_for_our_kernels_are_pytorchs(factor: float, dtype: torch.dtype) -> None:
    """Exponentials that overflow, and rows of which none is left."""
    q, k, v = (normal(1, 2, 300, 32, seed=seed).to(dtype) for seed in range(3))
    q, k = q.abs() * factor, k.abs() * 8
    out, lse = forward(q, k, v)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v))
    assert (lse.abs() > LARGEST_SUM).any()
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    upstream = normal(1, 2, 300, 32, seed=3).to(dtype)
    exact = torch.autograd.grad(plain(*leaves), leaves, upstream.double())
    for ours, truth in zip(backward(upstream, q, k, v, out, lse), exact, strict=True):
        assert (ours.double() - truth).norm() <= 5e-2 * truth.norm()


def test_a_value_that_is_none_stays_none() -> None:
    q, k, v = (normal(1, 2, 300, 32, seed=seed).float() for seed in range(3))
    q[0, 0, 0, 0] = torch.nan
    out, _ = forward(q, k, v)
    assert out[0, 0, 0].isnan().all()
    assert out[0, 1].isfinite().all()


def test_one_that_is_named_runs_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (normal(1, 2, 9, 32, seed=seed).float() for seed in range(3))
    called = []
    monkeypatch.setattr(avx512, "forward", lambda *_: called.append(1))
    out, _ = forward(q, k, v, "sdpa")
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v))
    assert not called
    narrow = (t[..., :24] for t in (q, k, v))
    with pytest.raises(ValueError, match=r"attention: avx512 cannot run here: .*32, 64 or 128.*24"):
        forward(*narrow, "avx512")


@pytest.mark.parametrize("able", [False, True])
def test_bfloat16_runs_in_float32_where_our_kernels_do_not_run(
    able: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(avx512, "refusal", lambda *_: None if able else "it has none")
    found = attention_dtype(torch.bfloat16, 64)
    assert found == (torch.bfloat16 if able else torch.float32)
    assert attention_dtype(torch.bfloat16, 64, "sdpa") == torch.float32
    assert attention_dtype(torch.float32, 64) == torch.float32
    assert attention_dtype(torch.float64, 64) == torch.float64
