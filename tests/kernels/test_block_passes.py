"""The passes between a block's products: their formulas, against autograd in float64."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fastjepa_kernels.block_passes import reference
from fastjepa_kernels.block_passes.op import (
    add_layer_norm,
    add_rows,
    column_sums,
    float8_rows,
    gelu,
    gelu_backward,
    layer_norm_backward,
    narrowed_with_sums,
)

EPS = 1e-6
HALF = torch.bfloat16


def close(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """To one rounding of `dtype` and float32's sums."""
    assert found.dtype == dtype
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), exact.cpu().to(found.device), rtol=step, atol=2e-5)


def normal(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g).to(dtype).to(device)


@pytest.mark.parametrize(
    ("stream", "dtype"), [(torch.float32, HALF), (HALF, HALF), (torch.float32, torch.float32)]
)
@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 9), width=st.sampled_from([16, 48, 384, 1408]))
def test_norm_and_sum(
    rows: int, width: int, stream: torch.dtype, dtype: torch.dtype, backend: str,
    device: torch.device,
) -> None:  # fmt: skip
    x, delta = (
        normal(rows, width, dtype=d, device=device, seed=s) for s, d in ((0, stream), (1, dtype))
    )
    weight, bias = (normal(width, dtype=torch.float32, device=device, seed=s) for s in (2, 3))
    for own, shift in ((delta, None), (delta, bias), (None, None)):
        total, normed = add_layer_norm(
            x, own, weight, bias, eps=EPS, dtype=dtype, shift_D=shift, backend=backend  # type: ignore[arg-type]
        )  # fmt: skip
        exact = x.double() if own is None else x.double() + own.double()
        if shift is not None:
            exact = exact + shift.double()
            assert torch.equal(add_rows(x, delta, shift, backend=backend), total)  # type: ignore[arg-type]
        close(total, exact, stream)
        close(
            normed,
            F.layer_norm(total.double(), (width,), weight.double(), bias.double(), EPS),
            dtype,
        )


@pytest.mark.parametrize(
    ("stream", "dtype"), [(torch.float32, HALF), (HALF, HALF), (torch.float32, torch.float32)]
)
@settings(max_examples=10, deadline=None)
@given(rows=st.sampled_from([1, 5, 70]), width=st.sampled_from([16, 48, 384]))
def test_the_norms_gradients(
    rows: int, width: int, stream: torch.dtype, dtype: torch.dtype, backend: str,
    device: torch.device,
) -> None:  # fmt: skip
    x, residual = (normal(rows, width, dtype=stream, device=device, seed=s) for s in (0, 1))
    dn = normal(rows, width, dtype=dtype, device=device, seed=2)
    weight, bias = (normal(width, dtype=torch.float32, device=device, seed=s) for s in (3, 4))
    found = layer_norm_backward(dn, x, residual, weight, bias, eps=EPS, backend=backend)  # type: ignore[arg-type]
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    normed = F.layer_norm(leaves[0], (width,), *leaves[1:], EPS)
    dx, dweight, dbias = torch.autograd.grad(normed, leaves, dn.double())
    dx = dx + residual.double()
    close(found.dx_RD, dx, stream)
    close(found.narrow_RD, dx, dtype)
    close(found.normed_RD, normed.detach(), dtype)
    for sums, exact in (
        (found.dweight_D, dweight), (found.dbias_D, dbias), (found.dx_sum_D, dx.sum(0)),
    ):  # fmt: skip
        assert sums.dtype == torch.float32
        torch.testing.assert_close(sums.double(), exact, rtol=1e-5, atol=1e-4)


@settings(max_examples=10, deadline=None)
@given(
    rows=st.sampled_from([1, 3, 40]), width=st.sampled_from([16, 96, 300]),
    dtype=st.sampled_from([HALF, torch.float32]),
)  # fmt: skip
def test_gelu_and_its_gradient(
    rows: int, width: int, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    h = (3 * normal(rows, width, dtype=torch.float32, device=device)).to(dtype)
    da = normal(rows, width, dtype=dtype, device=device, seed=1)
    bias = normal(width, dtype=torch.float32, device=device, seed=2)
    for shift in (None, bias):
        leaf = h.double().requires_grad_()
        exact = F.gelu(leaf if shift is None else leaf + shift)
        (slope,) = torch.autograd.grad(exact, leaf, da.double())
        close(gelu(h, shift, backend=backend), exact.detach(), dtype)  # type: ignore[arg-type]
        given_h, given_da = h.clone(), da.clone()
        assert gelu(given_h, shift, overwrite=True, backend=backend) is given_h  # type: ignore[arg-type]
        close(given_h, exact.detach(), dtype)
        dh, a, sums = gelu_backward(h, given_da, shift, backend=backend)  # type: ignore[arg-type]
        assert dh is given_da
        close(dh, slope, dtype)
        close(a, exact.detach(), dtype)
        torch.testing.assert_close(sums.double(), slope.sum(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("rows", "width"), list(product((1, 7, 100), (8, 300))))
def test_column_sums(rows: int, width: int, backend: str, device: torch.device) -> None:
    x = normal(rows, width, dtype=HALF, device=device)
    found = column_sums(x, backend=backend)  # type: ignore[arg-type]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), x.double().sum(0), rtol=1e-5, atol=1e-4)


def test_sums_of_rows_that_are_narrowed(backend: str, device: torch.device) -> None:
    x = normal(100, 300, dtype=torch.float32, device=device)
    for rows in (x, x.to(HALF)):
        narrow, sums = narrowed_with_sums(rows, HALF, backend=backend)  # type: ignore[arg-type]
        assert torch.equal(narrow, rows.to(HALF))
        torch.testing.assert_close(sums.double(), rows.double().sum(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_rows_in_float8(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    sizes = torch.logspace(-3, 3, 70, device=device)[:, None]
    x = (normal(70, 300, dtype=dtype, device=device) * sizes).to(dtype)
    x[3] = 0
    narrow, scale = float8_rows(x, backend=backend)  # type: ignore[arg-type]
    expected, expected_scale = reference.float8_rows(x.cpu())
    assert narrow.dtype == torch.float8_e4m3fn
    assert torch.equal(scale.cpu(), expected_scale)
    assert torch.equal(narrow.cpu().view(torch.uint8), expected.view(torch.uint8))


def test_two_runs_give_the_same_bits(backend: str, device: torch.device) -> None:
    x, dn = (normal(500, 48, dtype=torch.float32, device=device, seed=s) for s in (0, 1))
    weight = torch.ones(48, device=device)

    def run() -> list[Tensor]:
        norm = layer_norm_backward(dn, x, x, weight, weight, eps=EPS, backend=backend)  # type: ignore[arg-type]
        return [*norm, *gelu_backward(x, dn.clone(), backend=backend), column_sums(x)]  # type: ignore[arg-type]

    for one, other in zip(run(), run(), strict=True):
        assert torch.equal(one, other)


def test_no_rows(backend: str, device: torch.device) -> None:
    x, weight = torch.ones(0, 16, device=device), torch.ones(16, device=device)
    total, normed = add_layer_norm(x, x, weight, weight, eps=EPS, dtype=HALF, backend=backend)  # type: ignore[arg-type]
    assert total.shape == normed.shape == (0, 16)
    grads = layer_norm_backward(normed, x, x, weight, weight, eps=EPS, backend=backend)  # type: ignore[arg-type]
    assert not grads.dweight_D.any()
    assert not column_sums(x, backend=backend).any()  # type: ignore[arg-type]


def test_what_does_not_fit_is_named() -> None:
    x, weight = torch.ones(4, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"delta: expected \(4, 8\), got \(3, 8\)"):
        add_layer_norm(x, x[:3], weight, weight, eps=EPS, dtype=HALF)
    with pytest.raises(ValueError, match=r"weight: expected \[8\], got \(7,\)"):
        add_layer_norm(x, None, weight[:7], weight, eps=EPS, dtype=HALF)
    with pytest.raises(ValueError, match=r"shift: expected \[8\], got \(7,\)"):
        add_rows(x, x, weight[:7])
    with pytest.raises(ValueError, match=r"da: expected a contiguous tensor"):
        gelu_backward(torch.ones(8, 4), x.t())
    with pytest.raises(ValueError, match=r"h: expected a contiguous tensor"):
        gelu(x.t(), overwrite=True)
    with pytest.raises(ValueError, match=r"rows: expected \[R, D\], got \(8,\)"):
        column_sums(weight)
