"""Rotary positions: kernel and twin against the formula, the inverse as gradient, in place, bad
input."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastjepa_kernels import rope3d, rope3d_
from fastjepa_kernels.rope3d import reference
from fastjepa_kernels.rope3d.op import (
    _rope3d,
    _rope3d_in_place,
    as_factor,
    rotate_into,
    turn_rows_,
    turned_gradient,
)
from fastjepa_kernels.rope3d.reference import rotate

LEADS: list[tuple[int, ...]] = [(), (1,), (3,), (2, 2)]


def table(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Angles for `shape` = (..., rows, channels)."""
    angle = torch.rand(*shape[:-1], shape[-1] // 2, dtype=torch.float64) * 6
    return torch.stack((angle.cos(), angle.sin()), -1).to(dtype)


def test_a_pair_is_turned_by_its_angle() -> None:
    angle = torch.tensor([0.3, 1.1])
    turn = torch.stack((angle.cos(), angle.sin()), -1)
    x = torch.tensor([1.0, 0.0, 0.0, 2.0])
    expected = torch.stack(
        (angle[0].cos(), angle[0].sin(), -2 * angle[1].sin(), 2 * angle[1].cos())
    )
    torch.testing.assert_close(rotate(x, turn), expected)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_op_formula_and_gradient_agree_in_float64(
    data: st.DataObject, backend: str, device: torch.device
) -> None:
    lead = data.draw(st.sampled_from(LEADS))
    tokens, heads = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 5))
    channels = data.draw(st.sampled_from([2, 6, 16, 32, 48, 64]))
    broadcast = tuple(data.draw(st.sampled_from([1, n])) for n in lead)
    broadcast = broadcast[data.draw(st.integers(0, len(broadcast))) :]
    index = None
    if data.draw(st.booleans()):
        dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
        index = torch.randint(0, 9, (*broadcast, tokens), dtype=dtype).to(device)
        turn = table(9, channels).to(device)
    else:
        turn = table(*broadcast, tokens, channels).to(device)
    qkv = torch.randn(*lead, tokens, 3, heads, channels, dtype=torch.float64, device=device)
    qkv.requires_grad_()
    out, exact = rope3d(qkv, turn, index, backend=backend), reference.rope3d(qkv, turn, index)
    torch.testing.assert_close(out, exact, rtol=1e-13, atol=1e-13)
    upstream = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, qkv, upstream)
    (grad_exact,) = torch.autograd.grad(exact, qkv, upstream)
    torch.testing.assert_close(grad, grad_exact, rtol=1e-13, atol=1e-13)
    placed = qkv.detach().clone()
    assert rope3d_(placed, turn, index, backend=backend) is placed
    assert torch.equal(placed, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "channels"), [(22, 64), (12, 32), (3, 48), (5, 6)])
def test_error_is_at_most_twice_that_of_the_formula(
    dtype: torch.dtype, heads: int, channels: int, backend: str, device: torch.device
) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, 4, 3, heads, channels, device=device).to(dtype).requires_grad_()
    turn = table(4, channels).to(device)

    def error(function: Callable[..., Tensor]) -> tuple[float, float]:
        wide = qkv.detach().double().requires_grad_()
        exact, out = reference.rope3d(wide, turn), function(qkv, turn.float())
        assert out.dtype == dtype
        (grad_exact,) = torch.autograd.grad(exact, wide, exact.detach().to(dtype).double())
        (grad,) = torch.autograd.grad(out, qkv, exact.detach().to(dtype))
        return tuple(  # type: ignore[return-value]
            float((a.double() - b).detach().abs().max())
            for a, b in ((out, exact), (grad, grad_exact))
        )

    for found, allowed in zip(
        error(lambda *x: rope3d(*x, backend=backend)), error(reference.rope3d), strict=True
    ):
        assert found <= 2 * allowed


@pytest.mark.parametrize("in_place", [False, True])
def test_values_and_gradient_however_it_is_called(
    in_place: bool, backend: str, device: torch.device, called: Callable[[Any], Any]
) -> None:
    turn = table(9, 6).to(device)
    index = torch.randint(0, 9, (4,), device=device)
    op = rope3d_ if in_place else rope3d

    def function(x: Tensor) -> Tensor:
        qkv = (x * 2).unflatten(-1, (3, 2, 6))
        return op(qkv, turn, index, backend=backend) * 3  # type: ignore[arg-type]

    def formula(x: Tensor) -> Tensor:
        return reference.rope3d((x * 2).unflatten(-1, (3, 2, 6)), turn, index) * 3

    x = torch.randn(2, 4, 36, dtype=torch.float64, device=device, requires_grad=True)
    out, exact = called(function)(x), formula(x)
    torch.testing.assert_close(out, exact)
    upstream = torch.randn_like(exact)
    before = upstream.clone()
    (grad,) = torch.autograd.grad(out, x, upstream)
    assert torch.equal(upstream, before)
    (grad_exact,) = torch.autograd.grad(exact, x, upstream)
    torch.testing.assert_close(grad, grad_exact)


@pytest.mark.parametrize("in_place", [False, True])
def test_the_op_has_the_gradient_of_its_values(in_place: bool) -> None:
    turn, index = table(3, 6), torch.tensor([2, 0, 2])
    op = rope3d_ if in_place else rope3d
    qkv = torch.randn(2, 3, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    function = lambda x: op(x * 1.0, turn, index)  # noqa: E731
    assert torch.autograd.gradcheck(function, qkv)
    assert torch.autograd.gradgradcheck(function, qkv)


@pytest.mark.parametrize(("heads", "channels"), [(1, 6), (3, 32), (5, 48)])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_rows_by_hand_are_the_op_and_its_gradient(
    rows: int, heads: int, channels: int, backend: str, device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if backend == "triton":  # with programs that walk over several rows
        kernel = importlib.import_module("fastjepa_kernels.rope3d.kernel")
        monkeypatch.setattr(kernel, "PROGRAMS", 3)
    turn = table(rows, channels, dtype=torch.float32).to(device)
    qkv = torch.randn(rows, 3, heads, channels, device=device).bfloat16().requires_grad_()
    out = rope3d(qkv, turn, backend=backend)
    by_hand = qkv.detach().clone()
    assert turn_rows_(by_hand, turn, backend=backend) is by_hand
    assert torch.equal(by_hand, out)
    # Of three strides: packed, head by head, and alone.
    upstream = torch.randn(rows, 3, heads, channels, device=device).bfloat16()
    dk = upstream[:, 1].transpose(0, 1).contiguous().transpose(0, 1)
    dv = upstream[:, 2].contiguous()
    packed, sums = turned_gradient(upstream[:, 0], dk, dv, turn, backend=backend)
    expected = torch.autograd.grad(out, qkv, upstream)[0]
    assert torch.equal(packed, expected)
    assert sums.dtype == torch.float32
    exact = expected.sum(0, dtype=torch.float64)
    # The kernel sums before it rounds to bfloat16.
    torch.testing.assert_close(sums.double(), exact, rtol=0.0, atol=2**-8 * max(rows, 1) ** 0.5)


def test_gradients_that_do_not_fit_one_another_are_named() -> None:
    dq, turn = torch.ones(4, 2, 8), table(4, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"dk: expected torch.float32 \(4, 2, 8\) like dq"):
        turned_gradient(dq, dq[:3], dq, turn)
    with pytest.raises(ValueError, match=r"table: expected shape"):
        turned_gradient(dq, dq, dq, turn[:3])


def strided(kind: str, qkv: Tensor) -> Tensor:
    """The values of `qkv` [2, 3, 4, 3, 2, 6] with other strides."""
    if kind == "head first":
        return qkv.permute(0, 3, 1, 4, 2, 5).contiguous().permute(0, 2, 4, 1, 3, 5)
    if kind == "wider channels":
        return torch.nn.functional.pad(qkv, (1, 4))[..., 1:7]
    if kind == "channels apart":
        return qkv.movedim(-1, 0).contiguous().movedim(0, -1)
    if kind == "leads swapped":
        return qkv.transpose(0, 1).contiguous().transpose(0, 1)
    return torch.nn.functional.pad(qkv, (0, 2))[..., :6]


@pytest.mark.parametrize(
    "kind", ["head first", "wider channels", "channels apart", "leads swapped", "padded"]
)
def test_strides(kind: str, backend: str, device: torch.device) -> None:
    qkv = torch.randn(2, 3, 4, 3, 2, 6, device=device)
    turn = table(4, 6, dtype=torch.float32).to(device)
    exact = rope3d(qkv, turn, backend=backend)
    other = strided(kind, qkv)
    assert not other.is_contiguous()
    across = turn.transpose(0, 1).contiguous().transpose(0, 1)
    apart = turn.movedim(-1, 0).contiguous().movedim(0, -1)
    for t in (turn, across, apart):
        assert torch.equal(rope3d(other, t, backend=backend), exact)
    assert torch.equal(other, qkv)
    rope3d_(other, turn, backend=backend)
    assert torch.equal(other, exact)


def test_places_beyond_two_to_the_31(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    qkv = far.as_strided((2, 3, 2, 4), (2**31, 8, 4, 1))
    qkv.copy_(torch.randn(2, 3, 2, 4))
    turn = table(2, 4, dtype=torch.float32).to(device)
    exact = rope3d(qkv.clone(), turn, backend=backend)
    assert torch.equal(rope3d(qkv, turn, backend=backend), exact)
    assert torch.equal(rope3d_(qkv, turn, backend=backend), exact)


def test_rotation_keeps_lengths_v_and_its_input(backend: str, device: torch.device) -> None:
    qkv = torch.randn(5, 3, 2, 12, device=device)
    qkv[0, 2, 0, 0] = torch.inf
    before = qkv.clone()
    out = rope3d(qkv, table(5, 12, dtype=torch.float32).to(device), backend=backend)
    assert torch.equal(qkv, before)
    assert torch.equal(out[:, 2], qkv[:, 2])
    torch.testing.assert_close(out[:, :2].norm(dim=-1), qkv[:, :2].norm(dim=-1))


def test_two_runs_give_the_same_bits(backend: str, device: torch.device) -> None:
    qkv = torch.randn(2, 3, 3, 4, 32, device=device).bfloat16()
    turn = table(3, 32, dtype=torch.float32).to(device)
    assert torch.equal(rope3d(qkv, turn, backend=backend), rope3d(qkv, turn, backend=backend))


def test_inverse_factors_turn_back_in_place() -> None:
    x = torch.randn(4, 6)
    turned, turn = x.clone(), table(4, 6, dtype=torch.float32)
    rotate_into(turned, as_factor(turn), turned)
    assert not torch.allclose(turned, x)
    rotate_into(turned, as_factor(turn, inverse=True), turned)
    torch.testing.assert_close(turned, x)


@pytest.mark.parametrize("shape", [(0, 4, 3, 2, 6), (2, 0, 3, 2, 6), (4, 3, 0, 6)])
def test_nothing_to_rotate(shape: tuple[int, ...], backend: str, device: torch.device) -> None:
    qkv = torch.zeros(shape, device=device)
    turn = torch.zeros(9, 3, 2, device=device)
    index = torch.zeros(shape[-4], dtype=torch.int64, device=device)
    assert rope3d(qkv, turn, index, backend=backend).shape == shape
    assert rope3d_(qkv, turn, index, backend=backend) is qkv


def test_they_are_well_behaved_ops(backend: str, device: torch.device) -> None:
    qkv = torch.randn(2, 3, 3, 2, 6, device=device, requires_grad=True)
    turn = table(5, 6, dtype=torch.float32).to(device)
    index = torch.tensor([4, 0, 4], device=device)
    torch.library.opcheck(_rope3d, (qkv, turn, index, False, backend))
    torch.library.opcheck(_rope3d, (qkv, turn[:3], None, True, backend))
    torch.library.opcheck(_rope3d_in_place, (qkv.detach(), turn, index, backend))


ZEROS = torch.zeros(5, 3, 1, 6)
WORDS: list[tuple[Tensor, Tensor, Tensor | None, str]] = [
    (torch.zeros(5, 3, 6), torch.zeros(5, 3, 2), None, "qkv: expected shape"),
    (torch.zeros(5, 2, 1, 6), torch.zeros(5, 3, 2), None, "qkv: expected shape"),
    (ZEROS.int(), torch.zeros(5, 3, 2), None, "qkv: expected float16"),
    (torch.zeros(5, 3, 1, 7), torch.zeros(5, 3, 2), None, "even number of head channels, got 7"),
    (ZEROS, torch.zeros(4, 3, 2), None, "table: expected shape"),
    (ZEROS, torch.zeros(5, 6, 2), None, "table: expected shape"),
    (ZEROS, torch.zeros(2, 5, 3, 2), None, "table: expected shape"),
    (ZEROS.expand(2, -1, -1, -1, -1), torch.zeros(3, 5, 3, 2), None, "table: expected shape"),
    (ZEROS, table(5, 6), None, "expected torch.float32 for a torch.float32 qkv"),
    (ZEROS.double(), torch.zeros(5, 3, 2), None, "expected torch.float64"),
    (ZEROS, torch.zeros(2, 5, 3, 2), torch.arange(5), r"table: expected shape \[M, 3, 2\]"),
    (ZEROS, torch.zeros(5, 3, 2), torch.arange(4), r"index: expected int32 or int64 \[..., 5\]"),
    (ZEROS, torch.zeros(5, 3, 2), torch.zeros(5), "index: expected int32"),
    (ZEROS, torch.zeros(5, 3, 2), torch.arange(5)[None], "index: expected int32"),
    (ZEROS, torch.zeros(4, 3, 2), torch.arange(5), r"index: indices 0\.\.4 leave the table of 4"),
    (ZEROS, torch.zeros(5, 3, 2, device="meta"), None, "table: expected a tensor on cpu"),
]


@pytest.mark.parametrize("op", [rope3d, rope3d_])
@pytest.mark.parametrize(("qkv", "turn", "index", "words"), WORDS)
def test_bad_input_is_named(
    op: Callable[..., Tensor], qkv: Tensor, turn: Tensor, index: Tensor | None, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        op(qkv.clone(), turn, index)


def test_what_cannot_be_rotated_in_place_is_refused() -> None:
    turn = torch.zeros(5, 3, 2)
    with pytest.raises(ValueError, match="qkv: an expanded tensor"):
        rope3d_(torch.zeros(3, 1, 6).expand(5, 3, 1, 6), turn)
    leaf = torch.zeros(5, 3, 1, 6, requires_grad=True)
    with pytest.raises(ValueError, match="qkv: a leaf that requires grad"):
        rope3d_(leaf, turn)
    with torch.no_grad():
        rope3d_(leaf, turn)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_runs_agree_and_in_place_allocates_nothing() -> None:
    qkv = torch.randn(24, 2048, 3, 16, 64, device="cuda").bfloat16()
    turn = table(2048, 64, dtype=torch.float32).cuda()
    first = rope3d(qkv, turn)
    assert all(torch.equal(rope3d(qkv, turn), first) for _ in range(100))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    rope3d_(qkv, turn)
    assert torch.cuda.max_memory_allocated() == before
    assert torch.equal(qkv, first)
