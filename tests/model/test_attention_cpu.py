"""Attention on a CPU: PyTorch's against the formula, and when it is ours."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastjepa.model import attention_cpu
from fastjepa.model.attention_cpu import (
    LARGEST_SUM,
    LONG,
    backward,
    forward,
    rotary_backward,
    rotary_forward,
)
from fastjepa_kernels.packed_attention import avx512
from fastjepa_kernels.rope3d import reference


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


def packed(dtype: torch.dtype, deviation: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [2, 50, 3, 3, 32], a table for all sequences, and what comes from above."""
    angle = 3 * normal(1, 50, 16, seed=1)
    table = torch.stack([angle.cos(), angle.sin()], -1)
    return (
        normal(2, 50, 3, 3, 32, deviation=deviation).to(dtype),
        table if dtype == torch.float64 else table.float(),
        normal(2, 50, 3, 32, seed=2).to(dtype),
    )


def rotary_exact(qkv: Tensor, table: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By the formula in float64: output, log-sum-exp and the packed gradient."""
    leaf = qkv.double().clone().requires_grad_()
    q, k, v = reference.rope3d(leaf, table.double()).permute(2, 0, 3, 1, 4)
    out = plain(q, k, v).transpose(1, 2)
    (grad,) = torch.autograd.grad(out, leaf, upstream.double())
    return out.detach(), (q @ k.mT * 32**-0.5).logsumexp(-1).detach(), grad


@pytest.mark.parametrize("backend", ["auto", "sdpa"])
@pytest.mark.parametrize(
    ("dtype", "deviation", "tolerance"),
    [
        (torch.float64, 1.0, 1e-12),
        (torch.float32, 1.0, 4e-6),
        (torch.bfloat16, 1.0, 2e-2),
        (torch.float32, 4.0, 4e-5),
    ],
)
def test_packed_heads_are_turned_there_and_back(
    dtype: torch.dtype, deviation: float, tolerance: float, backend: str
) -> None:
    """By our kernels, by PyTorch's, and by these where scores are too large for ours."""
    qkv, table, upstream = packed(dtype, deviation)
    exact, exact_lse, exact_grad = rotary_exact(qkv, table, upstream)
    assert bool((exact_lse.abs() > LARGEST_SUM).any()) == (deviation > 1)
    out, grad = torch.empty_like(upstream), torch.empty_like(qkv)
    lse = rotary_forward(qkv, table, out, backend)
    total = rotary_backward(upstream, qkv, table, out, lse, grad, backend)
    for ours, truth in ((out, exact), (grad, exact_grad)):
        assert (ours.double() - truth).norm() <= tolerance * truth.norm()
    assert total.shape == qkv.shape[2:]
    assert (total.double() - exact_grad.sum((0, 1))).norm() <= tolerance * exact_grad.norm()


def test_bfloat16_runs_in_float32_where_our_kernels_do_not_run() -> None:
    """Turned heads are not even rounded."""
    qkv, table, upstream = packed(torch.bfloat16)
    _, exact, _ = rotary_exact(qkv, table, upstream)
    lse = rotary_forward(qkv, table, torch.empty_like(upstream), "sdpa")
    assert (lse - exact).abs().max() <= 1e-5
