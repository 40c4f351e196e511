"""What lies between a block's products on a CPU: our kernels and PyTorch's give the same."""

import pytest
import torch
from torch import Tensor

from fastjepa.model import passes_cpu
from fastjepa_kernels.block_passes import reference

EPS = 1e-6
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-6}


@pytest.fixture(params=["ours", "PyTorch's"], autouse=True)
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "ours":
        refusal = passes_cpu.avx512.refusal(passes_cpu.CPU, torch.bfloat16)
        if refusal is not None:
            pytest.skip(refusal)
    else:
        monkeypatch.setattr(passes_cpu.avx512, "refusal", lambda *_: "not here")


def rows(seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(40, 24, generator=generator, dtype=torch.float64).to(dtype)


def close(ours: Tensor, truth: Tensor, dtype: torch.dtype | None, tolerance: float) -> None:
    assert dtype in (None, ours.dtype)
    assert (ours - truth).norm() <= tolerance * truth.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_and_its_gradient(dtype: torch.dtype) -> None:
    h, da = rows(0, dtype), rows(1, dtype)
    exact, a, total = reference.gelu_backward(h.double(), da.double(), None)
    close(passes_cpu.gelu(h), a, dtype, TOLERANCE[dtype])
    written = h.clone()
    assert passes_cpu.gelu(written, overwrite=True) is written
    assert torch.equal(written, passes_cpu.gelu(h))
    given = da.clone()
    dh, again, sum_ = passes_cpu.gelu_backward(h, given)
    assert dh is given
    close(dh, exact, dtype, TOLERANCE[dtype])
    assert torch.equal(again, passes_cpu.gelu(h))
    written = h.clone()
    over, again, _ = passes_cpu.gelu_backward(written, da, overwrite=True)
    assert again is written
    assert torch.equal(again, passes_cpu.gelu(h))
    assert torch.equal(over, dh)
    close(sum_, total, None, TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("stream", "products"), [*zip(DTYPES, DTYPES, strict=True), (torch.float32, torch.bfloat16)]
)
def test_the_norm_and_its_gradient(stream: torch.dtype, products: torch.dtype) -> None:
    x, residual, dn = rows(0, stream), rows(1, stream), rows(2, products)
    weight, bias = rows(3, torch.float32)[:2]
    wide = (t.double() for t in (dn, x, residual, weight, bias))
    dx, _, n, dweight, dbias, _ = reference.layer_norm_backward(*wide, EPS)
    tolerance = TOLERANCE[products]
    close(passes_cpu.layer_norm(x, weight, bias, EPS, products), n, products, tolerance)
    ours = passes_cpu.layer_norm_backward(dn, x, residual, weight, bias, EPS)
    close(ours[0], dx, stream, tolerance)
    close(ours[1], n, products, tolerance)
    close(ours[2], dweight, torch.float32, max(tolerance, 1e-6))
    close(ours[3], dbias, torch.float32, max(tolerance, 1e-6))
    close(ours[4], residual.double().sum(0), None, 1e-6)
