"""What the dense loss reads, writes and keeps: strides, the prediction's memory, repeated
backwards; and bad input."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastjepa_kernels import dense_l1
from fastjepa_kernels.dense_l1 import gradient, op

LEVELS, WIDTH, TOKENS, SIZES = 2, 24, 7, [1, 3]


@pytest.fixture
def inputs(device: torch.device) -> tuple[Tensor, list[Tensor], Tensor]:
    g = torch.Generator().manual_seed(0)
    z_RE = torch.randn(sum(SIZES), LEVELS * WIDTH, generator=g)
    wide_ME = torch.randn(TOKENS, LEVELS * WIDTH, generator=g).to(device)
    row_R = torch.cat([torch.randperm(TOKENS, generator=g)[:size] for size in SIZES])
    return z_RE.to(device), list(wide_ME.split(WIDTH, dim=1)), row_R.to(device)


def gradient_of(inputs: tuple[Any, ...], upstream: float = 1.0, **options: Any) -> Tensor:
    z_RE = inputs[0].detach().clone().requires_grad_()
    total, _ = dense_l1(z_RE, *inputs[1:], SIZES, **options)
    (found,) = torch.autograd.grad(total * upstream, z_RE)
    return found


def test_slices_of_one_tensor_are_as_good_as_separate_levels(inputs: Any, backend: Any) -> None:
    z_RE, levels, row_R = inputs
    assert not levels[0].is_contiguous()
    separate = [level.contiguous() for level in levels]
    expected = dense_l1(z_RE, separate, row_R, SIZES, backend=backend)
    gradient_there = gradient_of((z_RE, separate, row_R), backend=backend)
    apart = torch.cat((z_RE, z_RE), 1)[:, : LEVELS * WIDTH]
    across = z_RE.t().contiguous().t()
    lying = [level.t().contiguous().t() for level in levels]
    mixed = [levels[0], lying[1]]
    for z, targets in ((z_RE, levels), (apart, levels), (across, lying), (z_RE, mixed)):
        found = dense_l1(z, targets, row_R.int(), SIZES, backend=backend)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert torch.equal(gradient_of((z, targets, row_R), backend=backend), gradient_there)


def test_rows_that_nothing_names_are_never_read_and_inputs_stay_as_they_are(
    inputs: Any, backend: Any
) -> None:
    z_RE, levels, row_R = inputs
    unnamed = torch.ones(TOKENS, dtype=torch.bool, device=z_RE.device).index_fill(0, row_R, False)
    assert unnamed.any()
    for level in levels:
        level[unnamed] = torch.nan
    before = [t.clone() for t in (z_RE, *levels, row_R)]
    assert gradient_of(inputs, backend=backend).isfinite().all()
    for now, then in zip((z_RE, *levels, row_R), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"normalize_prediction": True}, {"smooth": 0.5}], ids=str)
def test_the_gradient_may_take_the_predictions_memory(
    inputs: Any, backend: Any, dtype: torch.dtype, options: Any
) -> None:
    z_RE, levels, row_R = inputs
    z_RE = z_RE.to(dtype)
    expected = gradient_of((z_RE, levels, row_R), 1.5, backend=backend, **options)
    # Rows apart, as a slice of a wider tensor: what lies between them stays.
    room = torch.full((len(z_RE), 2 * LEVELS * WIDTH), 7.0, dtype=dtype, device=z_RE.device)
    room[:, : LEVELS * WIDTH] = z_RE
    for mine in (z_RE.clone(), room[:, : LEVELS * WIDTH]):
        leaf = mine.requires_grad_()
        total, _ = dense_l1(
            leaf, levels, row_R, SIZES, backend=backend, overwrite_prediction=True, **options
        )
        (found,) = torch.autograd.grad(total * 1.5, leaf)
        assert torch.equal(found, expected)
        assert found.data_ptr() == mine.data_ptr()
    assert (room[:, LEVELS * WIDTH :] == 7.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_overwriting_inside_a_compiled_function(
    inputs: Any, backend: Any, called: Callable[[Any], Any], dtype: torch.dtype
) -> None:
    z_RE, levels, row_R = inputs
    z_RE = z_RE.to(dtype)

    def loss(z_RE: Tensor) -> Tensor:
        prediction = z_RE * 1.0
        return dense_l1(
            prediction, levels, row_R, SIZES, overwrite_prediction=True, backend=backend
        )[0]

    leaf = z_RE.clone().requires_grad_()
    (called(loss)(leaf) * 1.5).backward()
    assert torch.equal(leaf, z_RE)
    expected = gradient_of((z_RE, levels, row_R), 1.5, backend=backend)
    torch.testing.assert_close(leaf.grad, expected)


def test_without_a_gradient_nothing_is_kept_or_overwritten(inputs: Any, backend: Any) -> None:
    z_RE, levels, row_R = inputs
    before, leaf = z_RE.clone(), z_RE.clone().requires_grad_()
    total, terms = dense_l1(z_RE, levels, row_R, SIZES, overwrite_prediction=True, backend=backend)
    assert not total.requires_grad
    assert torch.equal(z_RE, before)
    with torch.no_grad():
        again, _ = dense_l1(leaf, levels, row_R, SIZES, backend=backend)
    kept, own_terms = dense_l1(leaf, levels, row_R, SIZES, backend=backend)
    assert kept.requires_grad
    assert not own_terms.requires_grad
    assert torch.equal(total, again)
    assert torch.equal(total, kept.detach())
    assert torch.equal(terms, own_terms)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kept_graph_gives_the_same_gradient_each_time(
    inputs: Any, backend: Any, overwrite: bool
) -> None:
    z_RE, levels, row_R = inputs
    once = gradient_of(inputs, backend=backend)
    leaf = z_RE.clone().requires_grad_()
    total, _ = dense_l1(leaf, levels, row_R, SIZES, backend=backend, overwrite_prediction=overwrite)
    for upstream, sum_so_far in ((1.0, 1.0), (1.0, 2.0), (3.0, 5.0)):
        (total * upstream).backward(retain_graph=True)
        torch.testing.assert_close(leaf.grad, once * sum_so_far)
    (total * 2.0).backward()
    torch.testing.assert_close(leaf.grad, once * 7.0)


def test_the_last_backward_scales_in_place(
    inputs: Any, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second tensor of the prediction's size is made only where the graph is kept."""
    copies = []
    scale = gradient._scale

    def count(stored: Tensor, out: Tensor, *rest: Any) -> None:
        copies.append(out is not stored)
        scale(stored, out, *rest)

    monkeypatch.setattr(gradient, "_scale", count)
    leaf = inputs[0].clone().requires_grad_()
    total, _ = dense_l1(leaf, *inputs[1:], SIZES, backend=backend)
    total.backward(retain_graph=True)
    total.backward()
    assert copies == [True, False]


def test_a_second_derivative_is_refused(inputs: Any, backend: Any) -> None:
    leaf = inputs[0].clone().requires_grad_()
    share = torch.ones((), device=leaf.device, requires_grad=True)
    total, _ = dense_l1(leaf, *inputs[1:], SIZES, backend=backend)
    (first,) = torch.autograd.grad(total * share, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        first.sum().backward()


def test_two_runs_give_the_same_bits(inputs: Any, backend: Any) -> None:
    first, second = (dense_l1(*inputs, SIZES, backend=backend) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert torch.equal(gradient_of(inputs, backend=backend), gradient_of(inputs, backend=backend))


@pytest.mark.parametrize("grad", [True, False])
def test_they_are_well_behaved_ops(inputs: Any, backend: Any, grad: bool) -> None:
    z_RE, levels, row_R = inputs
    weight = torch.rand(len(row_R), device=z_RE.device)
    options = (weight, None, SIZES, [0.5, 0.5], [1.0, 2.0], 1.0, 0.0, True, False, 1e-5)
    leaf = z_RE.clone().requires_grad_(grad)
    torch.library.opcheck(op._dense_l1, (leaf, levels, row_R, *options, grad, backend))
    torch.library.opcheck(op._dense_l1_, (z_RE.clone(), levels, row_R, *options, backend))
    upstream = torch.tensor(1.5, device=z_RE.device)
    torch.library.opcheck(gradient._scaled_gradient, (z_RE, upstream, 0.5, backend))


def test_no_rows_are_a_loss_of_0(inputs: Any, backend: Any) -> None:
    z_RE, levels, row_R = inputs
    none = z_RE[:0].clone().requires_grad_()
    total, terms = dense_l1(none, levels, row_R[:0], [0, 0], backend=backend)
    total.backward()
    assert total.item() == 0.0
    assert not terms.any()
    assert none.grad is not None
    assert none.grad.shape == none.shape


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"targets_MD": []}, "targets: expected equal shapes"),
        ({"targets_MD": [torch.zeros(4, 3), torch.zeros(4, 2)]}, "targets: expected equal shapes"),
        ({"targets_MD": [torch.zeros(4, 3).int()] * 2}, "targets: expected floating-point"),
        ({"z_RE": torch.zeros(3, 6).long()}, "prediction: expected floating-point"),
        ({"z_RE": torch.zeros(3, 5)}, "2 levels x 3 = 6 channels, got 5"),
        ({"z_RE": torch.zeros(18)}, r"prediction: expected \[R, E\]"),
        ({"row_R": torch.tensor([0, 1, 4])}, r"row: indices 0\.\.4 leave targets of 4"),
        ({"row_R": torch.tensor([0, -1, 3])}, r"row: indices -1\.\.3"),
        ({"row_R": torch.zeros(3)}, "row: expected int32 or int64"),
        ({"row_R": torch.tensor([0, 1])}, r"row: expected int32 or int64 \[3\]"),
        ({"row_R": torch.zeros(3, dtype=torch.int64, device="meta")}, "row: expected a tensor on"),
        ({"group_sizes": [2]}, "group_sizes: expected sizes of 0 or more that add up to 3"),
        ({"group_sizes": [4, -1]}, "group_sizes: expected sizes of 0 or more"),
        ({"group_sizes": []}, "group_sizes"),
        ({"token_weight_R": torch.ones(2)}, r"token_weight: expected .* \[3\], got .* \(2,\)"),
        ({"token_weight_R": torch.ones(3).int()}, "token_weight: expected floating-point"),
        ({"level_weights": [1.0]}, "level_weights: expected 2 values, got 1"),
        ({"group_weights": [1.0]}, "group_weights: expected 2 values, got 1"),
        ({"group_weights": torch.ones(3)}, r"group_weights: expected .* \[2\]"),
        ({"exponent": 0.0}, "exponent: expected a positive number"),
        ({"smooth": -1.0}, "smooth: expected 0 or a positive number"),
        ({"smooth": 1.0, "exponent": 2.0}, r"smooth: expected 0 with exponent 2\.0, got 1\.0"),
        ({"backend": "triton", "z_RE": torch.zeros(3, 6).double()}, "at most 4 bytes a number"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {
        "z_RE": torch.zeros(3, 6),
        "targets_MD": [torch.zeros(4, 3), torch.zeros(4, 3)],
        "row_R": torch.tensor([0, 1, 3]),
        "group_sizes": [2, 1],
    }
    with pytest.raises(ValueError, match=words):
        dense_l1(**{**arguments, **change})


def test_only_a_prediction_of_separate_rows_can_be_overwritten() -> None:
    for z_RE in (torch.zeros(6, 3).t(), torch.zeros(1, 6).expand(3, 6)):
        with pytest.raises(ValueError, match="prediction: expected channels side by side"):
            dense_l1(
                z_RE.requires_grad_(), [torch.zeros(4, 3)] * 2, torch.tensor([0, 1, 3]), [2, 1],
                overwrite_prediction=True,
            )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_hundred_runs_and_peak_memory_on_a_gpu() -> None:
    rows, width = 8192, 1024
    g = torch.Generator("cuda").manual_seed(0)
    z_RE = torch.randn(rows, 4 * width, generator=g, device="cuda", dtype=torch.bfloat16)
    levels = [torch.randn(rows, width, generator=g, device="cuda") for _ in range(4)]
    row_R = torch.randperm(rows, generator=g, device="cuda")
    leaf = z_RE.requires_grad_()

    def step(**options: Any) -> tuple[Tensor, Tensor]:
        total, _ = dense_l1(leaf, levels, row_R, [rows // 2, rows // 2], **options)
        return total.detach(), torch.autograd.grad(total * 1.5, leaf)[0]

    first = step()
    for _ in range(100):
        torch.testing.assert_close(step(), first, rtol=0, atol=0)
    size = z_RE.numel() * z_RE.element_size()
    for options, most in (({}, 1.02 * size), ({"overwrite_prediction": True}, 0.02 * size)):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(**options)
        assert torch.cuda.max_memory_allocated() - before <= most


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_rows_beyond_2_to_the_31_numbers_on_a_gpu() -> None:
    width = 1024
    far = 2**31 // width + 2
    targets_MD = torch.zeros(far + 1, width, device="cuda", dtype=torch.bfloat16)
    targets_MD[far] = torch.arange(width, device="cuda") / width
    z_RE = torch.zeros(1, width, device="cuda")
    row_R = torch.tensor([far], device="cuda")
    found, _ = dense_l1(z_RE, [targets_MD], row_R, [1], backend="triton")
    expected, _ = dense_l1(z_RE, [targets_MD[far:]], row_R * 0, [1], backend="reference")
    torch.testing.assert_close(found, expected)
