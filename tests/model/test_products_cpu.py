"""Products by oneDNN or MKL are the plain products, in every precision and shape."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastjepa.model import products_cpu
from fastjepa.model.products_cpu import (
    MANY_ROWS,
    grad_input,
    grad_weight,
    linear,
    linear_add,
)
from fastjepa_kernels import precision

SHAPES = [(1, 8, 8), (7, 24, 16), (50, 16, 48), (MANY_ROWS, 8, 24)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def close(found: Tensor, exact: Tensor, dtype: torch.dtype, terms: int) -> None:
    """As near as a sum of so many products comes."""
    assert found.dtype == dtype
    error = (found.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-3)
    assert error <= (3 + terms**0.5) * torch.finfo(dtype).eps, error


def inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    rows, wide, out = shape
    sizes = ((rows, wide), (out, wide), (out,), (rows, out))
    draw = torch.Generator().manual_seed(0)
    return tuple((torch.randn(size, generator=draw) / size[-1] ** 0.25).to(dtype) for size in sizes)


@pytest.mark.parametrize("wide_vectors", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_each_product_is_the_plain_one(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    wide_vectors: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products_cpu, "wide_vectors", lambda: wide_vectors)
    x, weight, bias, dy = inputs(shape, dtype)
    X, W, b, DY = (t.double() for t in (x, weight, bias, dy))
    exact = F.linear(X, W, b)
    _, wide, out = shape
    close(linear(x, weight, bias), exact, dtype, terms=wide)
    close(linear_add(x, dy, weight, bias), DY + exact, dtype, terms=wide)
    close(grad_input(dy, weight), DY @ W, dtype, terms=out)
    close(grad_weight(dy, x), DY.t() @ X, dtype, terms=len(x))


@pytest.mark.parametrize("autocast", [False, True])
def test_where_bfloat16_is_slow_a_product_is_the_one_in_float32_rounded(
    autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: False)
    x, weight, bias, dy = inputs((50, 16, 48), torch.bfloat16)
    X, W, b, DY = (t.float() for t in (x, weight, bias, dy))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = [
            linear(x, weight, bias), linear_add(x, dy, weight, bias),
            grad_input(dy, weight), grad_weight(dy, x),
        ]  # fmt: skip
        wide = linear_add(x, DY, weight, bias)
    plain = [
        linear(X, W, b), linear_add(X, DY, W, b), grad_input(DY, W),
        grad_weight(DY, X),
    ]  # fmt: skip
    for rounded, exact in zip(found, plain, strict=True):
        assert torch.equal(rounded, exact.bfloat16())
    assert torch.equal(wide, plain[1])


def test_a_wider_residual_keeps_its_precision() -> None:
    x, weight, bias, _ = inputs((7, 24, 16), torch.bfloat16)
    residual = torch.randn(7, 16)
    out = linear_add(x, residual, weight, bias)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, residual + F.linear(x, weight, bias).float(), rtol=0, atol=2e-2)


def test_without_onednn_all_is_the_plain_product(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias, dy = inputs((7, 24, 16), torch.float32)
    monkeypatch.setattr(products_cpu, "wide_vectors", lambda: True)
    fast = [
        linear(x, weight, bias), linear_add(x, dy, weight, bias),
        grad_input(dy, weight),
    ]  # fmt: skip
    monkeypatch.setattr(products_cpu, "_by_onednn", lambda _: False)
    plain = [
        linear(x, weight, bias), linear_add(x, dy, weight, bias),
        grad_input(dy, weight),
    ]  # fmt: skip
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pytorch_without_onednn_is_asked_for_none(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a Mac, where torch.ops.mkldnn is empty."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    asked_once = precision.multiplies_bfloat16.__wrapped__
    monkeypatch.setattr(precision, "multiplies_bfloat16", asked_once)
    monkeypatch.setattr(products_cpu, "_onednn", None)
    monkeypatch.setattr(products_cpu, "wide_vectors", lambda: True)
    x, weight, bias, dy = inputs((7, 24, 16), dtype)
    assert torch.equal(linear(x, weight, bias), torch.addmm(bias, x, weight.t()))
    assert torch.equal(grad_input(dy, weight), dy @ weight)
    assert torch.equal(grad_weight(dy, x), dy.t() @ x)


def test_inputs_stay_as_they_are() -> None:
    x, weight, bias, dy = inputs((7, 24, 16), torch.float32)
    before = [t.clone() for t in (x, weight, bias, dy)]
    linear_add(x, dy, weight, bias)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, weight, bias, dy), strict=True))
