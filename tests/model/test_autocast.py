"""A product under autocast is PyTorch's, also where the processor is slow in its dtype."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastjepa.model.autocast import linear
from fastjepa_kernels import precision


@pytest.mark.parametrize("able", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_product_and_its_gradients_are_pytorchs(
    autocast: bool, able: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: able)
    draw = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=draw) for shape in ((50, 16), (48, 16), (48,))]

    def run(product: object) -> list[Tensor]:
        own = [leaf.clone().requires_grad_() for leaf in leaves]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = product(*own)  # type: ignore[operator]
        out.square().sum().backward()
        return [out, *(leaf.grad for leaf in own)]

    for ours, theirs in zip(run(linear), run(F.linear), strict=True):
        assert ours.dtype == theirs.dtype
        unit = 2.0**-8 if autocast else 2.0**-23
        assert (ours - theirs).norm() <= 2 * unit * theirs.norm()


def test_float32_takes_the_place_of_slow_bfloat16_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = torch.float64, torch.float32, torch.bfloat16, torch.float16
    tensors = [torch.ones(2, dtype=dtype) for dtype in kinds]
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: True)
    assert all(precision.as_multiplied(tensor) is tensor for tensor in tensors)
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: False)
    changed = [tensor for tensor in tensors if precision.as_multiplied(tensor) is not tensor]
    assert [tensor.dtype for tensor in changed] == [torch.bfloat16]
    assert precision.as_multiplied(changed[0]).dtype == torch.float32
    elsewhere = torch.ones(2, dtype=torch.bfloat16, device="meta")
    assert precision.as_multiplied(elsewhere) is elsewhere
