"""Attention over packed sequences: kernel and twin against the formula in float64, its gradients,
any lengths and strides, same bits twice, bad input."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastjepa_kernels import packed_attention
from fastjepa_kernels.packed_attention import kernel, op, reference
from fastjepa_kernels.packed_attention.kernel import Tile, Tiles

LENGTHS = [33, 1, 0, 64, 17]
# Few rows fill several tiles.
SMALL = Tiles(Tile(16, 32, 4, 2), Tile(32, 16, 4, 2), Tile(16, 32, 4, 2))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "tiles_for", lambda *_: SMALL)


@pytest.fixture
def _in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels take it, slowly; what they get wrong is not lost in half precision's errors."""
    monkeypatch.setattr(op, "KERNEL_DTYPES", (torch.float32, *op.KERNEL_DTYPES))


def starts_of(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def packed(rows: int, heads: int, channels: int, device: torch.device) -> Tensor:
    """q, k and v [R, 3, H, C] that neither level the softmax nor let one key win."""
    return torch.randn(rows, 3, heads, channels, dtype=torch.float64, device=device) * 1.3


def values_and_gradients(
    attend: Callable[..., Tensor], qkv_R3HC: Tensor, upstream_RHC: Tensor
) -> tuple[Tensor, Tensor]:
    leaf = qkv_R3HC.detach().requires_grad_()
    out = attend(*leaf.unbind(1))
    assert out.is_contiguous()
    assert out.dtype == qkv_R3HC.dtype
    (grad,) = torch.autograd.grad(out, leaf, upstream_RHC.to(out.dtype))
    return out.detach(), grad


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(
        st.one_of(st.integers(0, 50), st.sampled_from([1, 16, 31, 32, 33, 64])),
        min_size=1, max_size=3,
    ),
    heads=st.integers(1, 2),
    channels=st.sampled_from([16, 24, 32, 40, 64, 80, 128]),
    more=st.integers(0, 40),
)  # fmt: skip
@pytest.mark.usefixtures("small_tiles", "_in_float32")
def test_values_and_gradients_are_those_of_the_formula(
    lengths: list[int], heads: int, channels: int, more: int, backend: str, device: torch.device
) -> None:
    starts, rows = starts_of(lengths, device), sum(lengths)
    qkv = packed(rows, heads, channels, device).float()
    upstream = torch.randn(rows, heads, channels, device=device)
    found = values_and_gradients(
        lambda *x: packed_attention(*x, starts, max(lengths) + more, backend=backend), qkv, upstream
    )
    exact = values_and_gradients(
        lambda *x: reference.packed_attention(*x, starts), qkv.double(), upstream
    )
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "channels"), [(2, 32), (1, 64), (1, 80), (1, 128), (1, 16)])
def test_error_is_at_most_twice_that_of_the_formula(
    dtype: torch.dtype, heads: int, channels: int, backend: str, device: torch.device
) -> None:
    torch.manual_seed(0)
    lengths = [150, 71]
    starts, rows = starts_of(lengths, device), sum(lengths)
    qkv = packed(rows, heads, channels, device).to(dtype)
    upstream = torch.randn(rows, heads, channels, device=device).to(dtype)

    def formula(*x: Tensor) -> Tensor:
        return reference.packed_attention(*x, starts)

    def ours(*x: Tensor) -> Tensor:
        return packed_attention(*x, starts, max(lengths), backend=backend)

    exact = values_and_gradients(formula, qkv.double(), upstream)
    plain, found = (values_and_gradients(way, qkv, upstream) for way in (formula, ours))
    for times, a, b, c in zip((2, 3), found, plain, exact, strict=True):
        allowed = (b.double() - c).square().mean().sqrt()
        assert (a.double() - c).square().mean().sqrt() <= times * allowed


def strided(kind: str, x_RHC: Tensor) -> Tensor:
    """The same values with other strides."""
    if kind == "of a packed one":
        return torch.stack((x_RHC, x_RHC, x_RHC), 1)[:, 1]
    if kind == "heads first":
        return x_RHC.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == "wider channels":
        return torch.nn.functional.pad(x_RHC, (1, 4))[..., 1:-4]
    return x_RHC.movedim(-1, 0).contiguous().movedim(0, -1)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("which", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "kind", ["of a packed one", "heads first", "wider channels", "channels apart"]
)
def test_strides(kind: str, which: int, backend: str, device: torch.device) -> None:
    """Of q, k, v or the gradient that comes in."""
    lengths = [5, 18]
    starts, rows = starts_of(lengths, device), sum(lengths)
    dense = [torch.randn(rows, 2, 24, device=device).half() for _ in range(4)]
    other = [strided(kind, x) if number == which else x for number, x in enumerate(dense)]
    assert not other[which].is_contiguous()

    def run(q: Tensor, k: Tensor, v: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = packed_attention(*leaves, starts, 18, backend=backend)
        return out, *torch.autograd.grad(out, leaves, upstream)

    for a, b in zip(run(*dense), run(*other), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0 if backend == "triton" else 2e-3)
    if backend == "triton":
        assert all(x.is_contiguous() for x in run(*other))


@pytest.mark.usefixtures("small_tiles")
def test_two_runs_give_the_same_bits(backend: str, device: torch.device) -> None:
    starts = starts_of(LENGTHS, device)
    qkv = packed(sum(LENGTHS), 2, 32, device).half()
    upstream = torch.randn(sum(LENGTHS), 2, 32, device=device)
    first, second = (
        values_and_gradients(
            lambda *x: packed_attention(*x, starts, 64, backend=backend), qkv, upstream
        )
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.usefixtures("small_tiles")
def test_sequences_do_not_see_one_another(backend: str, device: torch.device) -> None:
    starts = starts_of([20, 19, 30], device)
    clean = packed(69, 2, 32, device).half()
    spoilt = clean.clone()
    spoilt[20:39] = torch.nan
    upstream = torch.randn(69, 2, 32, device=device)
    ours = lambda *x: packed_attention(*x, starts, 30, backend=backend)  # noqa: E731
    for a, b in zip(
        values_and_gradients(ours, clean, upstream),
        values_and_gradients(ours, spoilt, upstream),
        strict=True,
    ):
        assert b[20:39].isnan().all()
        for rows in (slice(0, 20), slice(39, 69)):
            assert torch.equal(a[rows], b[rows])


@pytest.mark.usefixtures("small_tiles")
def test_scores_of_any_size(backend: str, device: torch.device) -> None:
    """Beyond the range of exp: the largest wins, or all are equal."""
    starts = starts_of([40], device)
    qkv = torch.randn(40, 3, 1, 32, device=device).half()
    qkv[:, :2] *= 60
    out = packed_attention(*qkv.unbind(1), starts, 40, backend=backend)
    exact = reference.packed_attention(*qkv.double().unbind(1), starts)
    torch.testing.assert_close(out.double(), exact, rtol=2e-3, atol=2e-3)
    qkv[:, 0] = 0
    out = packed_attention(*qkv.unbind(1), starts, 40, backend=backend)
    mean = qkv[:, 2].double().mean(0, keepdim=True).expand(40, -1, -1)
    torch.testing.assert_close(out.double(), mean, rtol=2e-3, atol=2e-3)


@pytest.mark.usefixtures("small_tiles")
def test_however_it_is_called(device: torch.device, called: Callable[[Any], Any]) -> None:
    starts = starts_of(LENGTHS, device)
    qkv = packed(sum(LENGTHS), 2, 32, device).half()
    upstream = torch.randn(sum(LENGTHS), 2, 32, device=device)
    ours = lambda *x: packed_attention(*x, starts, 64, backend="triton")  # noqa: E731
    expected = values_and_gradients(ours, qkv, upstream)

    def function(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
        return packed_attention(q * 1, k, v * 1, starts, 64, backend="triton") * 1

    whole = called(function)
    for way in (
        lambda *x: whole(*x, starts),
        lambda *x: checkpoint(whole, *x, starts, use_reentrant=False),
    ):
        found = values_and_gradients(way, qkv, upstream)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(whole(*qkv.unbind(1), starts), expected[0])


@pytest.mark.usefixtures("small_tiles")
def test_only_what_is_asked_for_has_a_gradient(backend: str, device: torch.device) -> None:
    q, k, v = packed(8, 1, 16, device).half().unbind(1)
    starts = starts_of([8], device)
    leaf = k.clone().requires_grad_()
    packed_attention(q, leaf, v, starts, 8, backend=backend).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_nothing_to_attend_to(lengths: list[int], backend: str, device: torch.device) -> None:
    qkv = packed(0, 2, 32, device).half()
    starts = starts_of(lengths, device)
    found = values_and_gradients(
        lambda *x: packed_attention(*x, starts, 0, backend=backend), qkv, qkv[:, 0]
    )
    assert [x.numel() for x in found] == [0, 0]


@pytest.mark.usefixtures("small_tiles")
def test_they_are_well_behaved_ops(device: torch.device) -> None:
    q, k, v = (x.clone().requires_grad_() for x in packed(20, 2, 16, device).half().unbind(1))
    starts = starts_of([3, 17], device)
    torch.library.opcheck(op._packed_attention, (q, k, v, starts, 17))
    with torch.no_grad():
        out, shift = op._packed_attention(q, k, v, starts, 17)
        arguments = (torch.randn_like(out), q.detach(), k.detach(), v.detach(), out, shift)
        torch.library.opcheck(op._packed_attention_backward, (*arguments, starts, 17))


@pytest.mark.parametrize(
    ("dtype", "channels", "words"),
    [
        (torch.float32, 32, "takes float16 and bfloat16, got torch.float32"),
        (torch.float16, 8, "takes 16 to 128 channels in steps of 8, got 8"),
        (torch.float16, 36, "in steps of 8, got 36"),
        (torch.float16, 136, "got 136"),
    ],
)
def test_what_the_kernel_does_not_take_is_the_twins(
    dtype: torch.dtype, channels: int, words: str, device: torch.device
) -> None:
    qkv, starts = packed(5, 1, channels, device).to(dtype), starts_of([2, 3], device)
    exact = reference.packed_attention(*qkv.double().unbind(1), starts)
    out = packed_attention(*qkv.unbind(1), starts, 3)
    torch.testing.assert_close(out.double(), exact, rtol=2e-3, atol=2e-3)
    with pytest.raises(ValueError, match=f"backend: triton .*{words}"):
        packed_attention(*qkv.unbind(1), starts, 3, backend="triton")


X, STARTS = torch.zeros(5, 2, 16), torch.tensor([0, 2, 5], dtype=torch.int32)
WORDS: list[tuple[dict[str, Any], str]] = [
    ({"q_RHC": X[0]}, "q: expected shape"),
    ({"q_RHC": X.int()}, "q: expected float16, bfloat16, float32 or 64, got torch.int32"),
    ({"k_RHC": X[:4]}, "k: expected torch.float32 .5, 2, 16. like q"),
    ({"v_RHC": X[:, :1]}, "v: expected torch.float32 .5, 2, 16. like q"),
    ({"v_RHC": X.half()}, "v: expected .* like q, got torch.float16"),
    ({"starts_B1": STARTS.long()}, "starts: expected int32 .B . 1., got torch.int64"),
    ({"starts_B1": STARTS[None]}, "starts: expected int32"),
    ({"starts_B1": STARTS[:0]}, "starts: expected int32"),
    ({"starts_B1": STARTS[1:]}, "starts: expected ascending places from 0 to 5, got .2, 5."),
    ({"starts_B1": STARTS[:2]}, "starts: expected ascending places from 0 to 5, got .0, 2."),
    ({"starts_B1": STARTS[[0, 2, 1, 2]]}, "starts: expected ascending places"),
    ({"starts_B1": STARTS.to("meta")}, "starts: expected a tensor on cpu like q, got meta"),
    ({"k_RHC": X.to("meta")}, "k: expected a tensor on cpu like q, got meta"),
    ({"longest": 2}, "longest: a sequence has 3 rows, more than 2"),
    ({"longest": 0}, "longest: expected"),
    ({"backend": "cuda"}, "backend: expected one of"),
]


@pytest.mark.parametrize(("changed", "words"), WORDS)
def test_bad_input_is_named(changed: dict[str, Any], words: str) -> None:
    good: dict[str, Any] = {
        "q_RHC": X, "k_RHC": X, "v_RHC": X, "starts_B1": STARTS, "longest": 3
    }  # fmt: skip
    with pytest.raises(ValueError, match=words):
        packed_attention(**{**good, **changed})


def test_one_that_watches_sees_one_op(device: torch.device, watch: Any) -> None:
    """As checkpointing that keeps attention's output does."""
    qkv = torch.randn(5, 3, 1, 16, device=device).bfloat16().requires_grad_()
    with watch:
        out = packed_attention(*qkv.unbind(1), starts_of([2, 3], device), 3, backend="triton")
        out.sum().backward()
    assert [name for name in watch.seen if "packed_attention" in name] == [
        "fastjepa_kernels.packed_attention.default",
        "fastjepa_kernels.packed_attention_backward.default",
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("heads", "channels"), [(12, 32), (16, 64), (8, 128), (16, 80)])
def test_on_a_gpu_many_long_sequences(heads: int, channels: int) -> None:
    torch.manual_seed(0)
    lengths = [*torch.randint(100, 2049, (12,)).tolist(), 1, 2048]
    rows, starts = sum(lengths), starts_of(lengths, torch.device("cuda"))
    qkv = torch.randn(rows, 3, heads, channels, device="cuda").bfloat16()
    upstream = torch.randn(rows, heads, channels, device="cuda")
    ours = lambda *x: packed_attention(*x, starts, 2048)  # noqa: E731
    formula = lambda *x: reference.packed_attention(*x, starts)  # noqa: E731
    found = values_and_gradients(ours, qkv, upstream)
    for _ in range(20):
        again = values_and_gradients(ours, qkv, upstream)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    plain = values_and_gradients(formula, qkv, upstream)
    exact = values_and_gradients(formula, qkv.float(), upstream.bfloat16())
    for times, a, b, c in zip((2, 3), found, plain, exact, strict=True):
        allowed = (b.float() - c).square().mean().sqrt()
        assert (a.float() - c).square().mean().sqrt() <= times * allowed
