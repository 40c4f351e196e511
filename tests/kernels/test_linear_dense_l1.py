"""The dense loss straight from a linear head: against the formula, in chunks, with bad input."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastjepa_kernels import dense_l1, linear_dense_l1
from fastjepa_kernels.dense_l1 import linear, reference

Inputs = tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor, list[int]]


@pytest.fixture(scope="module")
def backend(loss_backend: str) -> str:
    return loss_backend


def make(
    *, levels: int = 2, width: int = 8, inner: int = 6, sizes: tuple[int, ...] = (5, 7),
    seed: int = 0,
) -> Inputs:  # fmt: skip
    """x, W, b, targets, rows and sizes, of numbers that bfloat16 holds exactly."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).bfloat16().double()

    rows, tokens = sum(sizes), max(*sizes, 1)
    row_R = torch.cat([torch.randperm(tokens, generator=g)[:size] for size in sizes])
    head = normal(levels * width, inner), normal(levels * width)
    targets = [normal(tokens, width) for _ in range(levels)]
    return normal(rows, inner), *head, targets, row_R, list(sizes)


def run(
    function: Callable[..., Any], inputs: Inputs, dtype: torch.dtype, head: torch.dtype,
    device: torch.device | str = "cpu", **options: Any,
) -> list[Tensor]:  # fmt: skip
    """Total, terms and the gradients of x, W and b, all in float64."""
    dtypes = (dtype, head, head)
    leaves = [
        leaf.to(device, kept, copy=True).requires_grad_()
        for leaf, kept in zip(inputs[:3], dtypes, strict=True)
    ]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    targets = [target.to(device, wide) for target in inputs[3]]
    if options.get("token_weight_R") is not None:
        options["token_weight_R"] = options["token_weight_R"].to(device, wide)
    total, terms = function(*leaves, targets, inputs[4].to(device), inputs[5], **options)
    (total * 1.5).backward()
    grads = [leaf.grad for leaf in leaves]
    assert [grad.dtype for grad in grads if grad is not None] == list(dtypes)
    return [t.detach().cpu().double() for t in (total, terms, *grads) if t is not None]


def options_of(inputs: Inputs, seed: int = 1) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    return {
        "token_weight_R": torch.rand(len(inputs[0]), generator=g).bfloat16().double() + 0.5,
        "level_weights": [0.5 + level for level in range(len(inputs[3]))],
        "group_weights": [0.25 + group for group in range(len(inputs[5]))],
    }


@settings(max_examples=25, deadline=None)
@given(
    inputs=st.builds(
        make,
        levels=st.integers(1, 4),
        width=st.sampled_from([2, 8, 17]),
        inner=st.integers(1, 9),
        sizes=st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple),
        seed=st.integers(0, 2**16),
    ),
    options=st.sampled_from(
        [{}, {"exponent": 2.0}, {"smooth": 0.5}, {"normalize_prediction": True},
         {"normalize_target": False}]
    ),
)  # fmt: skip
def test_in_float64_twin_and_formula_are_one(
    inputs: Inputs, options: dict[str, Any], device: torch.device
) -> None:
    options = {**options_of(inputs), **options}
    wide = torch.float64
    ours = run(linear_dense_l1, inputs, wide, wide, device, **options)
    theirs = run(reference.linear_dense_l1, inputs, wide, wide, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("width", [33, 64])
@pytest.mark.parametrize(
    ("dtype", "head"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
    ],
)
def test_it_is_at_most_twice_as_far_off_as_the_formula(
    width: int, dtype: torch.dtype, head: torch.dtype, backend: str, device: torch.device
) -> None:
    inputs = make(levels=3, width=width, inner=24, sizes=(9, 0, 12))
    options = options_of(inputs)

    def formula(x: Tensor, weight: Tensor, bias: Tensor, *rest: Any, **more: Any) -> Any:
        # As under autocast: the head runs in x's dtype.
        return reference.linear_dense_l1(x, weight.to(dtype), bias.to(dtype), *rest, **more)

    wide = torch.float64
    exact = run(reference.linear_dense_l1, inputs, wide, wide, **options)
    theirs = run(formula, inputs, dtype, head, **options)
    ours = run(linear_dense_l1, inputs, dtype, head, device, backend=backend, **options)
    # A total may be exact by luck: a few roundings are always allowed. A gradient is many numbers.
    for found, formula_found, true, roundings in zip(
        ours, theirs, exact, (4, 4, 1, 1, 1), strict=True
    ):
        error, error_of_formula = ((value - true).norm() for value in (found, formula_found))
        assert error <= 2 * error_of_formula + roundings * torch.finfo(dtype).eps * true.norm()


@pytest.mark.parametrize("options", [{}, {"exponent": 1.5}, {"smooth": 0.5}], ids=str)
def test_formula_and_twin_have_the_gradient_of_their_values(options: dict[str, float]) -> None:
    inputs = make()
    leaves = [leaf.clone().requires_grad_() for leaf in inputs[:3]]
    for function in (reference.linear_dense_l1, linear_dense_l1):

        def total(*head: Tensor, function: Any = function) -> Tensor:
            found: Tensor = function(*head, *inputs[3:], **options_of(inputs), **options)[0]
            return found

        assert torch.autograd.gradcheck(total, leaves)


def test_chunks_make_no_difference(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 rows at a time cut through a group, and the last chunk is short."""
    inputs = make()
    options = {**options_of(inputs), "backend": backend}
    single = torch.float32
    whole = run(linear_dense_l1, inputs, single, single, device, **options)
    monkeypatch.setattr(linear, "chunk_rows", lambda *_: 5)
    cut, again = (run(linear_dense_l1, inputs, single, single, device, **options) for _ in range(2))
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(again, cut, rtol=0, atol=0)


def test_it_is_dense_l1_of_the_heads_output(
    backend: Any, device: torch.device, called: Callable[[Any], Any]
) -> None:
    x, weight, bias, targets, row, sizes = make()
    leaves = [leaf.float().to(device).requires_grad_() for leaf in (x, weight, bias)]
    targets, row = [target.float().to(device) for target in targets], row.to(device)

    def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return linear_dense_l1(x * 1.0, weight, bias, targets, row, sizes, backend=backend)

    def apart(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        prediction = torch.nn.functional.linear(x, weight, bias)
        return dense_l1(prediction, targets, row, sizes, backend=backend)

    for found, expected in zip(called(fused)(*leaves), apart(*leaves), strict=True):
        torch.testing.assert_close(found, expected)
    grads = torch.autograd.grad(called(fused)(*leaves)[0] * 1.5, leaves)
    torch.testing.assert_close(grads, torch.autograd.grad(apart(*leaves)[0] * 1.5, leaves))


def test_only_what_asks_for_a_gradient_gets_one(backend: Any, device: torch.device) -> None:
    x, weight, bias, targets, row, sizes = make()
    x, weight, bias = (leaf.float().to(device) for leaf in (x, weight, bias))
    rest = ([target.float().to(device) for target in targets], row.to(device), sizes)
    total, terms = linear_dense_l1(x, weight, bias, *rest, backend=backend)
    assert not total.requires_grad
    assert not terms.requires_grad
    own, _ = linear_dense_l1(x, weight.requires_grad_(), bias, *rest, backend=backend)
    own.backward()
    assert torch.equal(own.detach(), total)
    assert weight.grad is not None
    assert x.grad is None
    assert bias.grad is None


def test_a_kept_graph_gives_the_same_gradient_each_time(backend: Any, device: torch.device) -> None:
    x, weight, bias, targets, row, sizes = make()
    leaves = [leaf.float().to(device).requires_grad_() for leaf in (x, weight, bias)]
    rest = ([target.float().to(device) for target in targets], row.to(device), sizes)
    total, _ = linear_dense_l1(*leaves, *rest, backend=backend)
    once = torch.autograd.grad(total, leaves, retain_graph=True)
    for upstream in (1.0, 3.0):
        (total * upstream).backward(retain_graph=True)
    total.backward()
    for leaf, grad in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, grad * 5.0)


def test_autocast_stays_out_of_it(backend: Any, device: torch.device) -> None:
    """The dtype of the head is x's, which the caller chose."""
    inputs = make(width=32, inner=16)
    single = torch.float32
    outside = run(linear_dense_l1, inputs, single, single, device, backend=backend)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        inside = run(linear_dense_l1, inputs, single, single, device, backend=backend)
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)


@pytest.mark.parametrize("grad", [True, False])
def test_it_is_one_op_where_something_watches_and_the_same_numbers_where_not(
    backend: Any, device: torch.device, watch: Any, grad: bool
) -> None:
    x, weight, bias, targets, row, sizes = make()
    leaves = [leaf.float().to(device).requires_grad_(grad) for leaf in (x, weight, bias)]
    rest = ([target.float().to(device) for target in targets], row.to(device), sizes)

    def numbers() -> list[Tensor]:
        total, terms = linear_dense_l1(*leaves, *rest, backend=backend)
        return [total, terms, *(torch.autograd.grad(total, leaves) if grad else ())]

    alone = numbers()
    with watch:
        watched = numbers()
    assert watch.seen.count("fastjepa_kernels.linear_dense_l1.default") == 1
    assert not any("addmm" in name for name in watch.seen)
    assert all(torch.equal(a, b) for a, b in zip(alone, watched, strict=True))


def test_without_values_it_gives_shapes_and_keeps_the_gradients() -> None:
    x, weight, bias, targets, row, sizes = make()
    leaves = [leaf.float().to("meta").requires_grad_() for leaf in (x, weight, bias)]
    kept: list[Tensor] = []

    def keep(saved: Tensor) -> Tensor:
        kept.append(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        total, terms = linear_dense_l1(
            *leaves, [t.to("meta") for t in targets], row.to("meta"), sizes
        )
    assert total.shape == ()
    assert terms.shape == (len(sizes), len(targets))
    assert [saved.shape for saved in kept] == [leaf.shape for leaf in leaves]


def test_a_compiler_sees_one_op() -> None:
    x, weight, bias, targets, row, sizes = make(sizes=(2, 3))
    graphs: list[str] = []

    def total(x: Tensor) -> Tensor:
        return linear_dense_l1(x.float(), weight.float(), bias.float(), targets, row, sizes)[0]

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph.code)
        return graph.forward

    torch.testing.assert_close(torch.compile(total, backend=keep)(x), total(x))
    (graph,) = graphs
    assert graph.count("fastjepa_kernels.linear_dense_l1") == 1
    assert "addmm" not in graph


@pytest.mark.parametrize("grad", [True, False])
def test_it_is_a_well_behaved_op(backend: str, device: torch.device, grad: bool) -> None:
    x, weight, bias, targets, row, sizes = make(sizes=(2, 3))
    leaves = [leaf.float().to(device).requires_grad_(grad) for leaf in (x, weight, bias)]
    options = (None, None, sizes, [0.5, 0.5], [0.5, 0.5], 1.0, 0.0, True, False, 1e-5)
    targets = [target.float().to(device) for target in targets]
    torch.library.opcheck(
        linear._linear_dense_l1, (*leaves, targets, row.to(device), *options, grad, backend)
    )


@pytest.mark.parametrize(
    ("rows", "channels"),
    [(69_000, 4 * 1024), (69_000, 4 * 1408), (35_000, 4 * 1664), (500_000, 4 * 1664)],
)
def test_a_chunk_is_small_beside_the_prediction(rows: int, channels: int) -> None:
    chunk = linear.chunk_rows(rows, channels * 2, torch.device("cuda"))
    assert chunk % 128 == 0
    assert chunk >= 1024
    # The prediction and its gradient are what the op saves.
    assert chunk <= 0.05 * 2 * rows


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x_RP": torch.zeros(1, 5)}, r"weight: expected \[E, 5\]"),
        ({"weight_EP": torch.zeros(3)}, r"weight: expected \[E, 4\]"),
        ({"weight_EP": torch.zeros(5, 4), "bias_E": torch.zeros(5)}, "1 levels x 3 = 3 channels"),
        ({"bias_E": torch.zeros(2)}, r"bias: expected \[3\], got \(2,\)"),
        ({"bias_E": torch.zeros(3, device="meta")}, "bias: expected a tensor on cpu"),
        ({"row_R": torch.tensor([2])}, r"row: indices 2\.\.2 leave targets of 1"),
        ({"smooth": 1.0, "exponent": 2.0}, "smooth: expected 0"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {
        "x_RP": torch.zeros(1, 4), "weight_EP": torch.zeros(3, 4), "bias_E": torch.zeros(3),
        "targets_MD": [torch.zeros(1, 3)], "row_R": torch.tensor([0]), "group_sizes": [1],
    }  # fmt: skip
    with pytest.raises(ValueError, match=words):
        linear_dense_l1(**{**arguments, **change})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_hundred_runs_and_peak_memory_on_a_gpu() -> None:
    rows, inner, width = 65_536, 384, 1024
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=g, device="cuda", dtype=dtype)

    x_RP = normal(rows, inner, dtype=torch.bfloat16).requires_grad_()
    head = [normal(4 * width, inner).requires_grad_(), normal(4 * width).requires_grad_()]
    levels, row_R = [normal(8192, width) for _ in range(4)], torch.arange(rows, device="cuda")
    rest = (levels, row_R % 8192, [rows // 2, rows // 2])

    def step(function: Callable[..., Any]) -> tuple[Tensor, ...]:
        total, _ = function(x_RP, *head, *rest)
        return total.detach(), *torch.autograd.grad(total * 1.5, (x_RP, *head))

    def apart(x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> Any:
        return dense_l1(torch.nn.functional.linear(x, weight.bfloat16(), bias.bfloat16()), *rest)

    def peak(function: Callable[..., Any]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(function)
        return torch.cuda.max_memory_allocated() - before

    first = step(linear_dense_l1)
    for _ in range(100):
        torch.testing.assert_close(step(linear_dense_l1), first, rtol=0, atol=0)
    # The gradient of x is in both, and nothing that chunks could save.
    dx = x_RP.numel() * x_RP.element_size()
    assert peak(linear_dense_l1) - dx <= 0.1 * peak(apart)
