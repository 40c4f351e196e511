"""The passes between a block's products by our kernels for AVX-512 against the formulas in float64:
any shapes and strides, numbers at the edges, any threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fastjepa_kernels.block_passes import avx512, reference

CPU = torch.device("cpu")
EPS = 1e-6
DTYPES = (torch.float32, torch.bfloat16)
# Half the distance of neighbours, of the larger.
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8}
# Of a stream and of products.
STREAMS = [(x, n) for x in DTYPES for n in DTYPES]
shapes = given(rows=st.integers(0, 70), width=st.integers(8, 100), seed=st.integers(0, 9))


def able(*dtypes: torch.dtype) -> None:
    refusal = avx512.refusal(CPU, *dtypes)
    if refusal is not None:
        pytest.skip(refusal)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def close(ours: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """Of that dtype, to its rounding and that of sums in float32."""
    assert ours.dtype == dtype
    assert (ours - truth).norm() <= (ROUNDING[dtype] + 1e-6) * truth.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_is_as_exact_as_pytorchs(dtype: torch.dtype) -> None:
    able(dtype)
    h = torch.linspace(-12, 12, 1_000_001).to(dtype)[None]
    exact = F.gelu(h.double())
    ours, theirs = ((a.double() - exact).abs() for a in (avx512.gelu(h), F.gelu(h)))
    assert ours.max() <= theirs.max()
    slack = 1.2e-7 * h.double().abs()
    assert bool((ours <= slack + ROUNDING[dtype] * exact.abs()).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelus_slope_is_as_exact_as_pytorchs(dtype: torch.dtype) -> None:
    able(dtype)
    h = torch.linspace(-12, 12, 1_000_001).to(dtype)[None]
    exact, _, _ = reference.gelu_backward(h.double(), torch.ones_like(h, dtype=torch.float64), None)
    theirs = torch.ops.aten.gelu_backward(torch.ones_like(h), h)
    ours, _, _ = avx512.gelu_backward(h, torch.ones_like(h))
    assert (ours.double() - exact).abs().max() <= (theirs.double() - exact).abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_far_away_gelu_is_its_input_or_zero(dtype: torch.dtype) -> None:
    able(dtype)
    far = torch.tensor([7.0, 1e4, 1e30, torch.inf], dtype=dtype)
    h = torch.stack([far, -far])
    a = avx512.gelu(h)
    assert torch.equal(a[0], far)
    assert torch.equal(a[1, :3], torch.zeros(3, dtype=dtype))
    slope, _, _ = avx512.gelu_backward(h, torch.ones_like(h))
    assert torch.equal(slope, torch.tensor([[1.0] * 4, [0.0] * 4], dtype=dtype))
    nothing = torch.full((1, 3), torch.nan, dtype=dtype)
    assert avx512.gelu(nothing).isnan().all()
    assert avx512.gelu_backward(nothing, torch.ones_like(nothing))[0].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None)
@shapes
def test_gelu_and_its_gradient(dtype: torch.dtype, rows: int, width: int, seed: int) -> None:
    able(dtype)
    h = 2 * normal(rows, width, seed=seed).to(dtype)
    da = normal(rows, width, seed=seed + 10).to(dtype)
    exact, again, total = reference.gelu_backward(h.double(), da.double(), None)
    a = avx512.gelu(h)
    close(a, again, dtype)
    written = h.clone()
    assert avx512.gelu(written, overwrite=True) is written
    assert torch.equal(written, a)
    given_ = da.clone()
    dh, second, sum_ = avx512.gelu_backward(h, given_)
    assert dh.data_ptr() == given_.data_ptr()
    close(dh, exact, dtype)
    close(sum_, total, torch.float32)
    assert torch.equal(second, a)
    written = h.clone()
    over, second, _ = avx512.gelu_backward(written, da, overwrite=True)
    assert second is written
    assert torch.equal(second, a)
    assert torch.equal(over, dh)


@pytest.mark.parametrize(("stream", "products"), STREAMS)
@settings(max_examples=40, deadline=None)
@shapes
def test_the_norm_and_its_gradient(
    stream: torch.dtype, products: torch.dtype, rows: int, width: int, seed: int
) -> None:
    able(stream, products)
    x = (3 * normal(rows, width, seed=seed) + normal(rows, 1, seed=seed + 10)).to(stream)
    dn = normal(rows, width, seed=seed + 20).to(products)
    residual = normal(rows, width, seed=seed + 30).to(stream)
    weight, bias = normal(2, width, seed=seed + 40)
    wide = (t.double() for t in (dn, x, residual, weight, bias))
    dx, _, n, dweight, dbias, _ = reference.layer_norm_backward(*wide, EPS)
    close(avx512.layer_norm(x, weight, bias, EPS, products), n, products)
    ours = avx512.layer_norm_backward(dn, x, residual, weight, bias, EPS)
    truths = dx, n, dweight, dbias, residual.double().sum(0)
    dtypes = stream, products, *[torch.float32] * 3
    for result, truth, dtype in zip(ours, truths, dtypes, strict=True):
        close(result, truth, dtype)


@pytest.mark.parametrize("width", range(1, 8))
def test_a_row_of_equal_numbers_is_the_bias(width: int) -> None:
    able(torch.float32)
    x, residual = torch.full((3, width), 0.7), normal(3, width, seed=0)
    weight, bias = normal(2, width, seed=1)
    n = avx512.layer_norm(x, weight, bias, EPS, torch.float32)
    assert (n - bias).abs().max() <= 2e-4
    zeros = torch.zeros_like(x)
    dx, _, dweight, dbias, _ = avx512.layer_norm_backward(zeros, x, residual, weight, bias, EPS)
    assert torch.equal(dx, residual)
    assert not dweight.any()
    assert not dbias.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_may_be_narrower_than_the_stream(dtype: torch.dtype) -> None:
    able(dtype)
    x, dn, residual = (normal(9, 48, seed=seed).to(dtype) for seed in range(3))
    weight, bias = normal(2, 48, seed=3).bfloat16()
    plain = weight.float(), bias.float()
    assert torch.equal(
        avx512.layer_norm(x, weight, bias, EPS, dtype), avx512.layer_norm(x, *plain, EPS, dtype)
    )
    narrow = avx512.layer_norm_backward(dn, x, residual, weight, bias, EPS)
    wide = avx512.layer_norm_backward(dn, x, residual, *plain, EPS)
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_lie_apart(dtype: torch.dtype) -> None:
    able(dtype)
    h, x, dn, residual = normal(30, 4, 50, seed=0).to(dtype)[:, :, 1:].unbind(1)
    weight, bias = normal(2, 49, seed=1)
    plain = [t.contiguous() for t in (h, x, dn, residual)]
    da = torch.ones_like(plain[0])

    def run(h: Tensor, x: Tensor, dn: Tensor, residual: Tensor) -> list[Tensor]:
        return [
            avx512.gelu(h),
            *avx512.gelu_backward(h, da.clone()),
            avx512.layer_norm(x, weight, bias, EPS, dtype),
            *avx512.layer_norm_backward(dn, x, residual, weight, bias, EPS),
        ]

    apart = run(h, x, dn, residual)
    assert all(torch.equal(a, b) for a, b in zip(apart, run(*plain), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("_threads")
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    able(dtype)
    h, x, dn, residual = normal(4, 300, 70, seed=0).to(dtype)
    weight, bias = normal(2, 70, seed=1)

    def run() -> list[Tensor]:
        return [
            *avx512.gelu_backward(h, dn.clone()),
            *avx512.layer_norm_backward(dn, x, residual, weight, bias, EPS),
        ]

    torch.set_num_threads(1)
    alone = run()
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(run(), alone, strict=True))


def test_a_refusal_says_why() -> None:
    assert avx512.refusal(torch.device("cuda"), torch.float32) == "it needs a CPU, not cuda"
    assert "float64" in str(avx512.refusal(CPU, torch.float32, torch.float64))
