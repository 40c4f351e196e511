"""The moving average: the formula, its veto, and what a small step needs of precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastjepa_kernels import ema_update
from fastjepa_kernels.ema import reference


def pair(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    shapes = ((3, 4), (5,), (1, 1, 2))
    return (
        [torch.randn(shape, dtype=dtype) for shape in shapes],
        [torch.randn(shape, dtype=dtype) for shape in shapes],
    )


@settings(max_examples=40, deadline=None)
@given(st.floats(0.0, 1.0), st.booleans())
def test_it_is_the_formula_in_place(momentum: float, with_veto: bool) -> None:
    targets, sources = pair()
    before = [s.clone() for s in sources]
    expected = [t.clone() for t in targets]
    reference.ema_update(expected, sources, momentum)
    veto = torch.zeros(()) if with_veto else None
    ema_update(targets, sources, momentum, veto=veto)
    torch.testing.assert_close(targets, expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(sources, before, strict=True))


def test_error_in_float32_is_at_most_twice_that_of_the_formula() -> None:
    target, source = torch.randn(4096), torch.randn(4096)
    exact = 0.99925 * target.double() + (1 - 0.99925) * source.double()
    by_formula, by_op = target.clone(), target.clone()
    reference.ema_update([by_formula], [source], 0.99925)
    ema_update([by_op], [source], 0.99925)
    error, error_ref = ((x.double() - exact).abs().max() for x in (by_op, by_formula))
    assert error <= 2 * error_ref


def test_a_veto_leaves_every_bit() -> None:
    targets, sources = pair(torch.float32)
    before = [t.clone() for t in targets]
    ema_update(targets, sources, 0.9, veto=torch.ones(()))
    assert all(torch.equal(a, b) for a, b in zip(targets, before, strict=True))


def test_a_bfloat16_source_is_widened() -> None:
    target, source = torch.ones(3), torch.full((3,), 2.0).bfloat16()
    ema_update([target], [source], 0.999)
    torch.testing.assert_close(target, torch.full((3,), 1.001))


def test_thousand_small_steps_do_not_stall() -> None:
    target, source = torch.zeros(8), torch.ones(8)
    for _ in range(1000):
        ema_update([target], [source], 0.99925)
    torch.testing.assert_close(target, torch.full((8,), 1 - 0.99925**1000), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("targets", "sources", "momentum", "words"),
    [
        ([torch.zeros(2)], [torch.zeros(2)], 1.5, "momentum: expected a value in"),
        ([torch.zeros(2)], [], 0.9, "sources: expected 1 tensors, got 0"),
        ([torch.zeros(2)], [torch.zeros(3)], 0.9, r"sources\[0\]: expected shape \(2,\)"),
        ([torch.zeros(2).bfloat16()], [torch.zeros(2)], 0.9, r"targets\[0\]: expected float32"),
    ],
)
def test_bad_input_is_named(
    targets: list[Tensor], sources: list[Tensor], momentum: float, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        ema_update(targets, sources, momentum)
