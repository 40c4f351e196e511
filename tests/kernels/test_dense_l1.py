"""The dense loss: kernel and twin against the formula in values, gradients and precision."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastjepa_kernels import dense_l1
from fastjepa_kernels.block_passes import avx512 as block_passes
from fastjepa_kernels.dense_l1 import avx512, op, reference, twin
from fastjepa_kernels.dense_l1.comparison import checked

FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(scope="module")
def backend(loss_backend: str) -> str:
    return loss_backend


_HOW = ("exponent", "smooth", "normalize_target", "normalize_prediction")


@dataclass
class Case:
    """A loss to take, of numbers that bfloat16 holds exactly: every dtype sees the same input."""

    z_RE: Tensor
    targets: list[Tensor]
    row_R: Tensor
    sizes: list[int]
    options: dict[str, Any]

    def run(
        self, function: Callable[..., Any], dtype: torch.dtype, target_dtype: torch.dtype,
        device: torch.device | str = "cpu", **more: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Total, terms and gradient, all in float64."""
        options = {
            key: value.to(device, target_dtype if target_dtype == torch.float64 else FLOAT)
            if isinstance(value, Tensor)
            else value
            for key, value in self.options.items()
        }
        z_RE = self.z_RE.to(device, dtype, copy=True).requires_grad_()
        targets = [target.to(device, target_dtype) for target in self.targets]
        total, terms = function(z_RE, targets, self.row_R.to(device), self.sizes, **options, **more)
        (total * 1.5).backward()
        assert z_RE.grad is not None
        assert z_RE.grad.dtype == dtype
        return total.detach().cpu().double(), terms.cpu().double(), z_RE.grad.cpu().double()


def make(
    *, levels: int = 2, width: int = 8, sizes: tuple[int, ...] = (6, 9), rows: int = 11,
    weighted: bool = True, beta: bool = True, factor: bool = False, exponent: float = 1.0,
    smooth: float = 0.0, normalize_target: bool = True, normalize_prediction: bool = False,
    seed: int = 0,
) -> Case:  # fmt: skip
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).bfloat16().double()

    kept = sum(sizes)
    # As in the model: a group names a row at most once, and may name all of them.
    row_R = torch.cat([torch.randperm(max(rows, *sizes), generator=g)[:size] for size in sizes])
    options = {
        "token_weight_R": normal(kept).abs() + 0.125 if weighted else None,
        "level_weights": [0.5 + level for level in range(levels)] if beta else None,
        "group_weights": normal(len(sizes)).abs() if factor else None,
        "exponent": 1.0 if smooth else exponent,
        "smooth": smooth,
        "normalize_target": normalize_target,
        "normalize_prediction": normalize_prediction,
    }
    targets = [normal(max(rows, *sizes), width) for _ in range(levels)]
    return Case(normal(kept, levels * width), targets, row_R, list(sizes), options)


def cases(*widths: int) -> st.SearchStrategy[Case]:
    return st.builds(
        make,
        levels=st.integers(1, 4),
        width=st.sampled_from(widths),
        sizes=st.lists(st.integers(0, 7), min_size=1, max_size=4).map(tuple),
        rows=st.integers(1, 9),
        weighted=st.booleans(),
        beta=st.booleans(),
        factor=st.booleans(),
        exponent=st.sampled_from([1.0, 1.5, 2.0]),
        smooth=st.sampled_from([0.0, 0.0, 0.5]),
        normalize_target=st.booleans(),
        normalize_prediction=st.booleans(),
        seed=st.integers(0, 2**16),
    )


@settings(max_examples=30, deadline=None)
@given(case=cases(2, 8, 17))
def test_in_float64_twin_and_formula_are_one(case: Case, device: torch.device) -> None:
    ours = case.run(dense_l1, torch.float64, torch.float64, device)
    theirs = case.run(reference.dense_l1, torch.float64, torch.float64)
    torch.testing.assert_close(ours[:2], theirs[:2], rtol=1e-12, atol=1e-12)
    # With two channels a layer norm squashes them to +-1: its gradient is a difference of equals.
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("dtype", "target"), [(FLOAT, FLOAT), (BRAIN, FLOAT), (HALF, BRAIN)])
@settings(max_examples=4, deadline=None)
@given(case=cases(16, 33, 48, 160))
def test_it_is_at_most_twice_as_far_off_as_the_formula(
    case: Case, dtype: torch.dtype, target: torch.dtype, backend: str, device: torch.device
) -> None:
    exact = case.run(reference.dense_l1, torch.float64, torch.float64)
    ours = case.run(dense_l1, dtype, target, device, backend=backend)
    # The formula normalises in the dtype it is given: the wide one.
    theirs = case.run(reference.dense_l1, dtype, FLOAT)
    # A total may be exact by luck: a few roundings are always allowed. A gradient is many numbers.
    for found, formula, true, roundings in zip(ours, theirs, exact, (4, 4, 1), strict=True):
        error, error_of_formula = ((value - true).norm() for value in (found, formula))
        floor = roundings * torch.finfo(dtype).eps * true.norm()
        assert error <= 2 * error_of_formula + floor


def test_a_cpu_with_avx512_compares_by_its_own_kernel_what_that_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def chosen(backend: str = "auto", prediction: torch.dtype = FLOAT, **options: Any) -> object:
        case = make(**options)
        z, targets = case.z_RE.to(prediction), [t.bfloat16() for t in case.targets]
        rest = checked(
            z, z.shape[1], targets, case.row_R, case.sizes, None, None, None, eps=1e-5,
            **{key: case.options[key] for key in _HOW},
        )  # fmt: skip
        return op.implementation(backend, z, rest)

    monkeypatch.setattr(op, "use_triton", lambda *_: False)
    able = block_passes.refusal(torch.device("cpu"), BRAIN) is None
    ours = avx512 if able else twin
    assert chosen() is ours
    assert chosen(normalize_target=False) is ours
    assert chosen(prediction=BRAIN) is ours
    for left in (
        {"exponent": 2.0}, {"smooth": 0.5}, {"normalize_prediction": True},
        {"prediction": HALF}, {"prediction": torch.float64}, {"backend": "reference"},
    ):  # fmt: skip
        assert chosen(**left) is twin  # type: ignore[arg-type]


def test_over_many_draws_it_is_at_most_twice_as_far_off_without_any_allowance(
    backend: str, device: torch.device
) -> None:
    squares = torch.zeros(2, 3, dtype=torch.float64)
    for seed in range(24):
        case = make(
            levels=1 + seed % 3, width=48, sizes=(2, 3), seed=seed, factor=seed % 2 == 0,
            smooth=0.5 * (seed % 4 == 0), normalize_prediction=seed % 5 == 0,
        )  # fmt: skip
        exact = case.run(reference.dense_l1, torch.float64, torch.float64)
        ours = case.run(dense_l1, FLOAT, FLOAT, device, backend=backend)
        theirs = case.run(reference.dense_l1, FLOAT, FLOAT)
        for number, found in enumerate((ours, theirs)):
            squares[number] += torch.stack(
                [((f - e).norm() / e.norm()).square() for f, e in zip(found, exact, strict=True)]
            )
    assert (squares[0].sqrt() <= 2 * squares[1].sqrt()).all()


@pytest.mark.parametrize(
    "options", [{}, {"exponent": 1.5}, {"exponent": 2.0}, {"smooth": 0.5}], ids=str
)
@pytest.mark.parametrize("normalize_prediction", [True, False])
def test_formula_and_twin_have_the_gradient_of_their_values(
    options: dict[str, float], normalize_prediction: bool
) -> None:
    case = make(normalize_prediction=normalize_prediction, factor=True, **options)  # type: ignore[arg-type]
    for function in (reference.dense_l1, dense_l1):
        for overwrite in ({}, {"overwrite_prediction": True})[: 1 + (function is dense_l1)]:

            def total(z_RE: Tensor, function: Any = function, overwrite: Any = overwrite) -> Tensor:
                found: Tensor = function(
                    z_RE.clone(), case.targets, case.row_R, case.sizes, **case.options, **overwrite
                )[0]
                return found

            assert torch.autograd.gradcheck(total, case.z_RE.clone().requires_grad_())


def test_it_is_the_mean_of_the_specification(
    backend: str, device: torch.device, called: Callable[[Any], Any]
) -> None:
    """Written out by hand: two groups, two levels, token weights."""
    z = torch.tensor([[1.0, 3.0, 0.0, 0.0], [0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    targets = [torch.tensor([[1.0, -1.0], [-5.0, 5.0]]), torch.tensor([[0.0, 8.0], [3.0, -3.0]])]
    rows, weight = torch.tensor([0, 1, 0]), torch.tensor([1.0, 0.5, 2.0])
    z = z.to(device).requires_grad_()

    def loss(z: Tensor, targets: list[Tensor], rows: Tensor, weight: Tensor) -> Any:
        return dense_l1(z, targets, rows, [2, 1], token_weight_R=weight, backend=backend)  # type: ignore[arg-type]

    total, terms = called(loss)(
        z, [target.to(device) for target in targets], rows.to(device), weight.to(device)
    )
    # Normalised over two channels the targets are +-1 (up to eps): level 0 of row 0 is (1, -1).
    first = torch.tensor([[(0 + 4) / 2, (1 + 1) / 2], [(1 + 1) / 2 * 0.5, (1 + 3) / 2 * 0.5]])
    second = torch.tensor([[(0 + 2) / 2 * 2.0, (2 + 0) / 2 * 2.0]])
    expected = torch.stack([first.mean(0), second.mean(0)])
    torch.testing.assert_close(terms.cpu(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(total.detach().cpu(), expected.mean(), rtol=1e-4, atol=1e-4)
    total.backward()
    # w / (G L n D), signed; the outer channels meet their target up to eps.
    assert z.grad is not None
    slope = torch.tensor([[1 / 16, 1 / 16], [-0.5 / 16, 0.5 / 16], [2 / 8, 2 / 8]])
    torch.testing.assert_close(z.grad.cpu()[:, 1:3], slope)


def test_all_groups_at_once_are_the_groups_one_by_one(backend: str, device: torch.device) -> None:
    """Predicted and context tokens of two mask groups: weights 1/2 and lambda/2."""
    case = make(sizes=(4, 3, 5, 6), levels=3)
    parts = zip(
        case.z_RE.split(case.sizes), case.row_R.split(case.sizes),
        case.options["token_weight_R"].split(case.sizes), (0.5, 0.5, 0.15, 0.15), strict=True,
    )  # fmt: skip
    ours = {**case.options, "group_weights": [0.5, 0.5, 0.15, 0.15]}
    whole = Case(case.z_RE, case.targets, case.row_R, case.sizes, ours)
    total, terms, grad = whole.run(dense_l1, FLOAT, FLOAT, device, backend=backend)
    alone = []
    for z, row, weight, share in parts:
        own = {**case.options, "token_weight_R": weight, "group_weights": [share]}
        part = Case(z, case.targets, row, [len(z)], own)
        alone.append(part.run(dense_l1, FLOAT, FLOAT, device, backend=backend))
    torch.testing.assert_close(total, sum(a[0] for a in alone), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(terms, torch.cat([a[1] for a in alone]), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(grad, torch.cat([a[2] for a in alone]), rtol=1e-6, atol=1e-9)


def test_a_weight_that_changes_on_the_device_compiles_once(
    backend: str, device: torch.device
) -> None:
    case = make()
    targets = [t.float().to(device) for t in case.targets]
    row = case.row_R.to(device)

    def loss(z: Tensor, weight: Tensor) -> Tensor:
        return dense_l1(z, targets, row, case.sizes, group_weights=weight, backend=backend)[0]  # type: ignore[arg-type]

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    z = case.z_RE.float().to(device)
    compiled(z, torch.tensor([0.5, 0.0], device=device))
    with torch.compiler.set_stance("fail_on_recompile"):
        found = compiled(z, torch.tensor([0.25, 0.75], device=device))
    exact, _ = reference.dense_l1(
        case.z_RE, case.targets, case.row_R, case.sizes, group_weights=[0.25, 0.75]
    )
    torch.testing.assert_close(found.cpu().double(), exact, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_a_prediction_that_meets_its_target_has_no_gradient(
    exponent: float, backend: str, device: torch.device
) -> None:
    z = torch.tensor([[1.0, -1.0, 0.5, 2.0]], device=device)
    target, row = z.clone(), torch.tensor([0], device=device)
    z.requires_grad_()
    total, _ = dense_l1(
        z, [target], row, [1], exponent=exponent, normalize_target=False,
        backend=backend,  # type: ignore[arg-type]
    )  # fmt: skip
    total.backward()
    assert total.item() == 0.0
    assert z.grad is not None
    assert not z.grad.any()


def test_a_half_precision_gradient_of_a_group_that_outweighs_the_rest_is_finite(
    backend: str, device: torch.device
) -> None:
    case, sizes = make(width=256, levels=4, weighted=False, beta=False), [1, 3]
    z_RE = case.z_RE[:1].to(device, HALF).expand(4, -1).clone().requires_grad_()
    total, _ = dense_l1(
        z_RE, [t.to(device, HALF) for t in case.targets],
        torch.zeros(4, dtype=torch.long, device=device), sizes, group_weights=[1e5, 30.0],
        backend=backend,  # type: ignore[arg-type]
    )  # fmt: skip
    total.backward()
    assert z_RE.grad is not None
    heavy, light = z_RE.grad[0].double().abs(), z_RE.grad[1].double().abs()
    torch.testing.assert_close(heavy, torch.full_like(heavy, 1e5 / 1024), rtol=1e-3, atol=0.0)
    torch.testing.assert_close(light, torch.full_like(light, 10 / 1024), rtol=1e-2, atol=0.0)


def test_a_half_precision_gradient_survives_its_small_mean(
    backend: str, device: torch.device
) -> None:
    """1e-9 is 0 in float16; times a loss scale of 2^16 it is not."""
    case = make(width=256, levels=4, weighted=False, beta=False)
    case.options["group_weights"] = [1e-5, 1e-5]
    inputs = case.z_RE.to(device, HALF).requires_grad_()
    targets = [t.to(device, HALF) for t in case.targets]
    total, _ = dense_l1(
        inputs, targets, case.row_R.to(device), case.sizes,
        group_weights=[1e-5, 1e-5], backend=backend,  # type: ignore[arg-type]
    )  # fmt: skip
    (total * 2.0**16).backward()
    exact = case.run(reference.dense_l1, torch.float64, torch.float64)[2] / 1.5 * 2.0**16
    assert inputs.grad is not None
    torch.testing.assert_close(inputs.grad.cpu().double(), exact, rtol=2e-3, atol=0.0)
