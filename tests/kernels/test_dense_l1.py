"""The dense loss op against the formula: values, gradients, precision, bad input."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastjepa_kernels as op
from fastjepa_kernels import dense_l1, linear_dense_l1, packed_rows
from fastjepa_kernels.dense_l1 import linear, reference


@dataclass
class Case:
    """A loss to take: predictor rows and head, targets, rows, groups, options."""

    x_RP: Tensor
    weight_EP: Tensor
    bias_E: Tensor
    targets: list[Tensor]
    row_R: Tensor
    sizes: list[int]
    options: dict[str, object]

    def run(
        self, module: object, dtype: torch.dtype, *, fused: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Total, terms and gradients with the inputs in `dtype`, everything widened to float64."""
        inputs = (self.x_RP, self.weight_EP, self.bias_E)
        leaves = [t.clone().to(dtype).requires_grad_() for t in inputs]
        options = dict(self.options)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        if isinstance(options["token_weight_R"], Tensor):
            options["token_weight_R"] = options["token_weight_R"].to(wide)
        targets = [t.to(wide) for t in self.targets]
        if fused:
            total, terms = module.linear_dense_l1(
                *leaves, targets, self.row_R, self.sizes, **options
            )  # type: ignore[attr-defined]
        else:
            leaves = [(self.x_RP @ self.weight_EP.t() + self.bias_E).to(dtype).requires_grad_()]
            total, terms = module.dense_l1(leaves[0], targets, self.row_R, self.sizes, **options)  # type: ignore[attr-defined]
        (total * 1.5).backward()
        return total.detach().double(), terms.double(), [leaf.grad.double() for leaf in leaves]  # type: ignore[union-attr]


def make(
    *, batch: int = 2, levels: int = 2, width: int = 8, kept: tuple[int, ...] = (3, 5),
    tokens: int = 9, weighted: bool = True, beta: bool = True, exponent: float = 1.0,
    normalise: bool = False, seed: int = 0,
) -> Case:  # fmt: skip
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        # Numbers that bfloat16 holds exactly, so that every precision gets the same input.
        return torch.randn(*shape, generator=g).bfloat16().double()

    groups = [
        torch.stack([torch.randperm(tokens, generator=g)[:k].sort().values for _ in range(batch)])
        for k in kept
    ]
    rows = batch * sum(kept)
    options = {
        "token_weight_R": normal(rows).abs() + 0.125 if weighted else None,
        "level_weights": [0.5 + i for i in range(levels)] if beta else None,
        "exponent": exponent,
        "normalize_prediction": normalise,
    }
    return Case(
        normal(rows, 6), normal(levels * width, 6), normal(levels * width),
        [normal(batch * tokens, width) for _ in range(levels)],
        packed_rows(groups, tokens), [index.numel() for index in groups], options,
    )  # fmt: skip


def cases(*widths: int) -> st.SearchStrategy[Case]:
    return st.builds(
        make,
        batch=st.integers(1, 3),
        levels=st.integers(1, 4),
        width=st.sampled_from(widths),
        kept=st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
        weighted=st.booleans(),
        beta=st.booleans(),
        exponent=st.sampled_from([1.0, 1.5, 2.0]),
        normalise=st.booleans(),
        seed=st.integers(0, 2**16),
    )


@settings(max_examples=80, deadline=None)
@given(cases(2, 8, 17), st.booleans())
def test_in_float64_op_and_formula_are_one(case: Case, fused: bool) -> None:
    total, terms, grads = case.run(op, torch.float64, fused=fused)
    total_ref, terms_ref, grads_ref = case.run(reference, torch.float64, fused=fused)
    torch.testing.assert_close(total, total_ref, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms, terms_ref, rtol=1e-12, atol=1e-12)
    # With two channels a layer norm squashes them to +-1: its gradient is a difference of equals.
    for ours, theirs in zip(grads, grads_ref, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=30, deadline=None)
@given(case=cases(16, 33))
def test_value_is_at_most_twice_as_far_off_as_the_formula(case: Case, dtype: torch.dtype) -> None:
    exact, exact_terms, _ = case.run(reference, torch.float64, fused=False)
    total, terms, _ = case.run(op, dtype, fused=False)
    total_ref, terms_ref, _ = case.run(reference, dtype, fused=False)
    # A single number may be exact by luck: a few roundings are always allowed.
    floor = 4 * torch.finfo(dtype).eps
    assert (total - exact).abs() <= 2 * (total_ref - exact).abs() + floor * exact
    budget = 2 * (terms_ref - exact_terms).abs().max() + floor * exact_terms.abs().max()
    assert (terms - exact_terms).abs().max() <= budget


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_gradient_is_at_most_twice_as_far_off_as_the_formula(
    exponent: float, fused: bool, dtype: torch.dtype
) -> None:
    case = make(batch=3, width=32, kept=(20, 31), tokens=40, exponent=exponent)
    # Inputs as this dtype sees them; p = 1 has a sign that a rounded prediction may flip.
    _, _, exact = case.run(reference, torch.float64, fused=fused)
    _, _, ours = case.run(op, dtype, fused=fused)
    _, _, theirs = case.run(reference, dtype, fused=fused)
    for grad, grad_ref, grad_exact in zip(ours, theirs, exact, strict=True):
        error, error_ref = ((g - grad_exact).norm() for g in (grad, grad_ref))
        assert error <= 2 * error_ref + torch.finfo(dtype).eps * grad_exact.norm()


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("exponent", [1.0, 1.5, 2.0])
def test_the_formula_and_the_ops_have_the_gradient_of_their_values(
    exponent: float, normalise: bool
) -> None:
    case = make(exponent=exponent, normalise=normalise)
    leaves = [t.clone().requires_grad_() for t in (case.x_RP, case.weight_EP, case.bias_E)]
    for function in (reference.linear_dense_l1, op.linear_dense_l1):

        def total(*inputs: Tensor, function: object = function) -> Tensor:
            value: Tensor = function(*inputs, case.targets, case.row_R, case.sizes, **case.options)[
                0
            ]  # type: ignore[operator]
            return value

        assert torch.autograd.gradcheck(total, leaves)


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(batch=3, kept=(7, 4), tokens=9)
    whole = case.run(op, torch.float64, fused=True)
    monkeypatch.setattr(linear, "CHUNK_ROWS", 5)
    cut = case.run(op, torch.float64, fused=True)
    torch.testing.assert_close(cut, whole)


def test_it_is_the_mean_of_the_specification() -> None:
    """Written out by hand for one clip: two groups, two levels, weights, lambda left to others."""
    z = torch.tensor([[1.0, 3.0, 0.0, 0.0], [0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    targets = [torch.tensor([[1.0, -1.0], [-5.0, 5.0]]), torch.tensor([[0.0, 8.0], [3.0, -3.0]])]
    rows, sizes = torch.tensor([0, 1, 0]), [2, 1]
    weight = torch.tensor([1.0, 0.5, 2.0])
    total, terms = dense_l1(z, targets, rows, sizes, token_weight_R=weight)
    # Normalised over two channels the targets are +-1 (up to eps): level 0 of row 0 is (1, -1).
    first = torch.tensor([[(0 + 4) / 2, (1 + 1) / 2], [(1 + 1) / 2 * 0.5, (1 + 3) / 2 * 0.5]])
    second = torch.tensor([[(0 + 2) / 2 * 2.0, (2 + 0) / 2 * 2.0]])
    expected = torch.stack([first.mean(0), second.mean(0)])
    torch.testing.assert_close(terms, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(total, expected.mean(), rtol=1e-4, atol=1e-4)


def test_rows_that_nothing_names_are_never_read_and_inputs_stay_as_they_are() -> None:
    case = make()
    named = set(case.row_R.tolist())
    for target in case.targets:
        for row in set(range(len(target))) - named:
            target[row] = torch.nan
    before = [t.clone() for t in (case.x_RP, case.weight_EP, case.bias_E, *case.targets)]
    total, _, grads = case.run(op, torch.float64, fused=True)
    assert total.isfinite()
    assert all(grad.isfinite().all() for grad in grads)
    after = [case.x_RP, case.weight_EP, case.bias_E, *case.targets]
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after, strict=True)
    )


def test_a_prediction_that_meets_its_target_has_no_gradient() -> None:
    target = torch.tensor([[1.0, -1.0, 1.0, -1.0]], dtype=torch.float64)
    y = torch.nn.functional.layer_norm(target, (4,), eps=1e-5)
    z = y.clone().requires_grad_()
    total, _ = dense_l1(z, [target], torch.tensor([0]), [1])
    total.backward()
    assert total.item() == 0.0
    assert z.grad is not None
    assert not z.grad.any()


def test_without_a_gradient_nothing_is_kept() -> None:
    case = make()
    with torch.no_grad():
        total, terms = linear_dense_l1(
            case.x_RP, case.weight_EP, case.bias_E, case.targets, case.row_R, case.sizes,
            **case.options,  # type: ignore[arg-type]
        )  # fmt: skip
    assert not total.requires_grad
    assert not terms.requires_grad
    assert torch.equal(total, case.run(op, torch.float64, fused=True)[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"targets_MD": []}, "targets: expected equal shapes"),
        ({"targets_MD": [torch.zeros(4, 3), torch.zeros(4, 2)]}, "targets: expected equal shapes"),
        ({"z_RE": torch.zeros(3, 5)}, "2 levels x 3 = 6 channels, got 5"),
        ({"z_RE": torch.zeros(18)}, r"prediction: expected \[R, E\]"),
        ({"row_R": torch.tensor([0, 1, 4])}, r"row: indices 0\.\.4 leave targets of 4"),
        ({"row_R": torch.tensor([0, -1, 3])}, r"row: indices -1\.\.3"),
        ({"row_R": torch.zeros(3)}, "row: expected int32 or int64"),
        ({"row_R": torch.tensor([0, 1])}, r"row: expected int32 or int64 \[3\]"),
        ({"group_sizes": [2]}, "group_sizes: expected sizes of 0 or more that add up to 3"),
        ({"group_sizes": [4, -1]}, "group_sizes: expected sizes of 0 or more"),
        ({"group_sizes": []}, "group_sizes"),
        ({"token_weight_R": torch.ones(2)}, r"token_weight: expected .* \[3\]"),
        ({"level_weights": [1.0]}, "level_weights: expected 2 values, got 1"),
        ({"exponent": 0.0}, "exponent: expected a positive number"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], words: str) -> None:
    arguments: dict[str, object] = {
        "z_RE": torch.zeros(3, 6),
        "targets_MD": [torch.zeros(4, 3), torch.zeros(4, 3)],
        "row_R": torch.tensor([0, 1, 3]),
        "group_sizes": [2, 1],
    }
    with pytest.raises(ValueError, match=words):
        dense_l1(**{**arguments, **change})  # type: ignore[arg-type]


def test_a_head_that_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"weight: expected \[E, 5\]"):
        linear_dense_l1(
            torch.zeros(1, 5), torch.zeros(3, 4), torch.zeros(3), [torch.zeros(1, 3)],
            torch.tensor([0]), [1],
        )  # fmt: skip
