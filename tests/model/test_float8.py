"""Products of float8 numbers: scales by rows, what the rounding costs, and what stays untouched."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fastjepa.model import Encoder, build_encoder
from fastjepa.model.block import Block
from fastjepa.model.float8 import Float8Linear, target_linear
from fastjepa.model.segments import segments_of
from fastjepa_kernels.block_passes.op import float8_rows

# Half a step between neighbours with 3 bits behind the point.
ROUNDING = 2.0**-4


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(1e-6, 1e6))
def test_each_row_is_rounded_by_its_own_scale(seed: int, size: float) -> None:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 32, generator=random) * size * torch.tensor([[1.0], [1e-3], [1e3], [0], [1]])
    q, scale = float8_rows(x)
    assert q.dtype == torch.float8_e4m3fn
    back = q.float() * scale
    assert torch.isfinite(back).all()
    # Numbers far below the largest of their row lie on an even grid.
    even = x.abs().amax(-1, keepdim=True) / 448.0 * 2.0**-9
    assert ((back - x).abs() <= ROUNDING * x.abs() + 1.01 * even).all()


def test_a_product_is_that_of_the_rounded_numbers() -> None:
    torch.manual_seed(0)
    layer, x = Float8Linear(48, 32), torch.randn(7, 48)
    (q, scale), (w, w_scale) = float8_rows(x), float8_rows(layer.weight.detach())
    exact = F.linear(q.double() * scale, w.double() * w_scale, layer.bias.double())
    torch.testing.assert_close(layer(x).double(), exact, rtol=1e-5, atol=1e-6)
    assert not layer(x).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_it_is_the_product_of_torchs_own_op() -> None:
    torch.manual_seed(0)
    layer, x = Float8Linear(48, 32), torch.randn(16, 48)
    (q, scale), (w, w_scale) = float8_rows(x), float8_rows(layer.weight.detach())
    theirs = torch._scaled_mm(
        q, w.t(), scale_a=scale, scale_b=w_scale.t(), out_dtype=torch.bfloat16
    ).float()
    torch.testing.assert_close(layer(x) - layer.bias, theirs, rtol=2.0**-7, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpus_blocks_take_it_too(dtype: torch.dtype) -> None:
    """Two blocks, the first one's last addition left to the second, against the plain way."""
    torch.manual_seed(0)
    blocks = [Block(24, 2, 40, linear=Float8Linear).requires_grad_(False) for _ in range(2)]
    x, segments = torch.randn(9, 24), segments_of([(1, 4), (1, 5)])
    angle = torch.rand(9, 6)
    table = torch.stack((angle.cos(), angle.sin()), -1)

    def run(way: str | None) -> torch.Tensor:
        for block in blocks:
            block.by_hand = way
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            first, *added = (x.to(dtype),)
            out = blocks[0](first, [table], segments, unsummed=True)
            first, *added = out if isinstance(out, tuple) else (out,)
            end: torch.Tensor = blocks[1](first, [table], segments, None, *added)
        return end.float()

    plain, ours = run(None), run("gpu")
    # A number may fall on the other side of a step of float8.
    assert float((ours - plain).norm() / plain.norm()) < (1e-2 if dtype == torch.float32 else 3e-2)


def test_a_targets_features_move_by_a_few_percent() -> None:
    torch.manual_seed(0)
    plain = build_encoder("vit_tiny", depth=4, levels=[1, 3])
    target = build_encoder("vit_tiny", depth=4, levels=[1, 3], linear=Float8Linear)
    target.load_state_dict(plain.state_dict())
    clip = torch.randn(1, 3, 2, 64, 64)
    with torch.no_grad():
        for ours, exact in zip(target(clip), plain(clip), strict=True):
            assert 1e-4 < float((ours - exact).norm() / exact.norm()) < 0.05


def test_a_cpu_takes_any_width_and_weights_have_their_names() -> None:
    cpu = torch.device("cpu")
    assert target_linear("float8", cpu, 13) is Float8Linear
    assert target_linear(None, cpu, 13) is torch.nn.Linear
    sizes = {"width": 24, "depth": 1, "heads": 2, "mlp_width": 40, "levels": [0]}
    assert (
        Encoder(**sizes, linear=Float8Linear).state_dict().keys()  # type: ignore[arg-type]
        == Encoder(**sizes).state_dict().keys()  # type: ignore[arg-type]
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_is_the_same_product() -> None:
    torch.manual_seed(0)
    layer, x = Float8Linear(64, 128), torch.randn(48, 64)
    here, there = layer(x), layer.cuda()(x.cuda()).cpu()
    torch.testing.assert_close(there, here, rtol=2.0**-7, atol=2e-2)
