"""Rotary positions: the op against the formula, its inverse as gradient, precision, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastjepa_kernels import rope3d
from fastjepa_kernels.rope3d.op import as_factor, rotate_into
from fastjepa_kernels.rope3d.reference import rotate


def table(tokens: int, channels: int, dtype: torch.dtype = torch.float64) -> Tensor:
    angle = torch.rand(tokens, channels // 2, dtype=torch.float64) * 6
    return torch.stack((angle.cos(), angle.sin()), -1).to(dtype)


def by_formula(qkv: Tensor, table_NC2: Tensor) -> Tensor:
    q, k, v = qkv.unbind(-3)
    turn = table_NC2[..., None, :, :]
    return torch.stack((rotate(q, turn), rotate(k, turn), v), dim=-3)


def test_a_pair_is_turned_by_its_angle() -> None:
    angle = torch.tensor([0.3, 1.1])
    turn = torch.stack((angle.cos(), angle.sin()), -1)
    x = torch.tensor([1.0, 0.0, 0.0, 2.0])
    expected = torch.stack(
        (angle[0].cos(), angle[0].sin(), -2 * angle[1].sin(), 2 * angle[1].cos())
    )
    torch.testing.assert_close(rotate(x, turn), expected)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 3), max_size=2), st.integers(1, 7), st.integers(1, 3),
    st.sampled_from([2, 6, 16, 32]),
)  # fmt: skip
def test_op_formula_and_gradient_agree_in_float64(
    lead: list[int], tokens: int, heads: int, channels: int
) -> None:
    qkv = torch.randn(*lead, tokens, 3, heads, channels, dtype=torch.float64, requires_grad=True)
    turn = table(tokens, channels)
    out, out_ref = rope3d(qkv, turn), by_formula(qkv, turn)
    torch.testing.assert_close(out, out_ref, rtol=1e-13, atol=1e-13)
    upstream = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, qkv, upstream)
    (grad_ref,) = torch.autograd.grad(out_ref, qkv, upstream)
    torch.testing.assert_close(grad, grad_ref, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_that_of_the_formula(dtype: torch.dtype) -> None:
    qkv = torch.randn(2, 50, 3, 4, 32).to(dtype)
    turn = table(50, 32)
    exact = by_formula(qkv.double(), turn)
    error = (rope3d(qkv, turn.float()).double() - exact).abs().max()
    error_ref = (by_formula(qkv, turn.float()).double() - exact).abs().max()
    assert rope3d(qkv, turn.float()).dtype == dtype
    assert error <= 2 * error_ref


def test_formula_and_op_have_the_gradient_of_their_values() -> None:
    qkv = torch.randn(1, 3, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    turn = table(3, 6)
    assert torch.autograd.gradcheck(lambda x: rope3d(x, turn), qkv)
    assert torch.autograd.gradcheck(lambda x: by_formula(x, turn), qkv)


def test_rotation_keeps_lengths_v_and_its_input() -> None:
    qkv = torch.randn(5, 3, 2, 12)
    before = qkv.clone()
    out = rope3d(qkv, table(5, 12, torch.float32))
    assert torch.equal(qkv, before)
    assert torch.equal(out[:, 2], qkv[:, 2])
    torch.testing.assert_close(out.norm(dim=-1), qkv.norm(dim=-1))


def test_every_clip_may_have_positions_of_its_own() -> None:
    qkv = torch.randn(2, 5, 3, 2, 12, dtype=torch.float64)
    tables = torch.stack([table(5, 12), table(5, 12)])
    both = rope3d(qkv, tables)
    for b in range(2):
        assert torch.equal(both[b], rope3d(qkv[b], tables[b]))


def test_inverse_factors_turn_back_in_place() -> None:
    x = torch.randn(4, 6)
    turned, turn = x.clone(), table(4, 6, torch.float32)
    rotate_into(turned, as_factor(turn), turned)
    assert not torch.allclose(turned, x)
    rotate_into(turned, as_factor(turn, inverse=True), turned)
    torch.testing.assert_close(turned, x)


@pytest.mark.parametrize(
    ("qkv", "turn", "words"),
    [
        (torch.zeros(5, 3, 6), torch.zeros(5, 3, 2), "qkv: expected shape"),
        (torch.zeros(5, 2, 1, 6), torch.zeros(5, 3, 2), "qkv: expected shape"),
        (torch.zeros(5, 3, 1, 7), torch.zeros(5, 3, 2), "even number of head channels, got 7"),
        (torch.zeros(5, 3, 1, 6), torch.zeros(4, 3, 2), "table: expected shape"),
        (torch.zeros(5, 3, 1, 6), torch.zeros(5, 6, 2), "table: expected shape"),
        (torch.zeros(5, 3, 1, 6), table(5, 6), "expected torch.float32 for a torch.float32 qkv"),
        (torch.zeros(5, 3, 1, 6).double(), torch.zeros(5, 3, 2), "expected torch.float64"),
    ],
)
def test_bad_input_is_named(qkv: Tensor, turn: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rope3d(qkv, turn)
