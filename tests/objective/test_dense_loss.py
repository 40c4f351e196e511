"""The objective: predictive and context terms, level weights, and the ablations of the paper."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastjepa.objective.dense_loss import LossTerms, Objective, dense_loss

BATCH, TOKENS, WIDTH, LEVELS = 2, 10, 4, 3
PREDICT = (torch.tensor([[0, 3], [4, 9]]), torch.tensor([[1, 2, 5], [6, 7, 8]]))
CONTEXT = (torch.tensor([[1], [2]]), torch.tensor([[0, 9], [3, 4]]))
WEIGHTS = (torch.tensor([[0.5], [1.0]]), torch.tensor([[0.25, 1.0], [0.75, 0.5]]))


class Inputs:
    """Rows, heads and targets in float64."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.predicted = torch.randn(10, 6, dtype=torch.float64, requires_grad=True)
        self.context = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
        self.heads = [nn.Linear(6, LEVELS * WIDTH).double() for _ in range(2)]
        self.targets = [
            torch.randn(BATCH * TOKENS, WIDTH, dtype=torch.float64) for _ in range(LEVELS)
        ]

    def loss(
        self,
        objective: Objective,
        *,
        weights: tuple[Tensor, ...] | None = WEIGHTS,
        context_weight: float = 0.5,
    ) -> LossTerms:
        return dense_loss(
            objective, predicted_RP=self.predicted, context_RP=self.context,
            predict_head=self.heads[0], context_head=self.heads[1], targets_MD=self.targets,
            predict_groups_BK=PREDICT, context_groups_BK=CONTEXT, weights_BK=weights,
            context_weight=context_weight, num_tokens=TOKENS,
        )  # fmt: skip

    def by_hand(
        self,
        kind: int,
        groups: tuple[Tensor, ...],
        weights: tuple[Tensor, ...] | None,
        p: float = 1,
    ) -> Tensor:
        """Means [G, L] straight from the specification's sums."""
        rows = (self.predicted, self.context)[kind]
        z = self.heads[kind](rows).unflatten(1, (LEVELS, WIDTH))
        terms, start = [], 0
        for g, index in enumerate(groups):
            per_level = torch.zeros(LEVELS, dtype=torch.float64)
            for b in range(BATCH):
                for k in range(index.shape[1]):
                    for level, target in enumerate(self.targets):
                        y = F.layer_norm(target[b * TOKENS + index[b, k]], (WIDTH,), eps=1e-5)
                        value = ((z[start, level] - y).abs() ** p / p).mean()
                        per_level[level] += value * (1.0 if weights is None else weights[g][b, k])
                    start += 1
            terms.append(per_level / index.numel())
        return torch.stack(terms)


EQUAL = Objective(level_weights=(1 / 3,) * 3)


def test_it_is_the_specifications_sum() -> None:
    inputs = Inputs()
    terms = inputs.loss(EQUAL)
    predict, context = inputs.by_hand(0, PREDICT, None), inputs.by_hand(1, CONTEXT, WEIGHTS)
    torch.testing.assert_close(terms.predict_terms, predict)
    torch.testing.assert_close(terms.context_terms, context)
    torch.testing.assert_close(terms.predict, predict.mean())
    torch.testing.assert_close(terms.context, context.mean())
    torch.testing.assert_close(terms.total, predict.mean() + 0.5 * context.mean())


def test_equal_level_weights_are_the_mean_over_all_channels() -> None:
    """Which is what the reference takes, having laid the levels side by side."""
    inputs = Inputs()
    z = inputs.heads[0](inputs.predicted)
    y = torch.cat([F.layer_norm(t, (WIDTH,)) for t in inputs.targets], -1)
    rows = [(i + torch.tensor([[0], [TOKENS]])).flatten() for i in PREDICT]
    parts = z.split([4, 6])
    expected = sum((part - y[row]).abs().mean() for part, row in zip(parts, rows, strict=True)) / 2
    torch.testing.assert_close(inputs.loss(EQUAL).predict, expected)


def test_level_weights_weigh_levels() -> None:
    inputs, beta = Inputs(), torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    terms = inputs.loss(Objective(level_weights=(0.5, 0.0, 2.0)))
    torch.testing.assert_close(terms.predict_terms, inputs.by_hand(0, PREDICT, None))
    torch.testing.assert_close(terms.predict, (terms.predict_terms * beta).sum(-1).mean())


def test_vjepa_2_is_the_last_level_without_context_term() -> None:
    inputs = Inputs()
    terms = inputs.loss(Objective(level_weights=(0.0, 0.0, 1.0)), context_weight=0.0)
    torch.testing.assert_close(terms.total, inputs.by_hand(0, PREDICT, None)[:, 2].mean())
    assert terms.context is None
    assert terms.context_terms is None
    terms.total.backward()
    assert inputs.context.grad is None
    assert inputs.heads[1].weight.grad is None


def test_dense_adds_the_context_term_and_deep_the_other_levels() -> None:
    inputs = Inputs()
    dense = inputs.loss(Objective(level_weights=(0.0, 0.0, 1.0)))
    last = inputs.by_hand(0, PREDICT, None)[:, 2].mean()
    context = inputs.by_hand(1, CONTEXT, WEIGHTS)[:, 2].mean()
    torch.testing.assert_close(dense.total, last + 0.5 * context)
    assert inputs.loss(EQUAL).total.item() != dense.total.item()


def test_without_distance_weights_each_context_token_counts_alike() -> None:
    inputs = Inputs()
    terms = inputs.loss(EQUAL, weights=None)
    torch.testing.assert_close(terms.context, inputs.by_hand(1, CONTEXT, None).mean())


@pytest.mark.parametrize("exponent", [1.5, 2.0])
def test_exponent(exponent: float) -> None:
    inputs = Inputs()
    terms = inputs.loss(Objective((1 / 3,) * 3, exponent=exponent))
    torch.testing.assert_close(terms.predict, inputs.by_hand(0, PREDICT, None, exponent).mean())


def test_predictions_are_normalised_on_request() -> None:
    inputs = Inputs()
    normal = inputs.loss(Objective((1 / 3,) * 3, normalize_prediction=True)).predict
    with torch.no_grad():
        for parameter in inputs.heads[0].parameters():
            parameter.mul_(100.0)
    again = inputs.loss(Objective((1 / 3,) * 3, normalize_prediction=True)).predict
    # Scale means nothing then, but for the eps of the normalisation.
    torch.testing.assert_close(normal, again, rtol=1e-3, atol=0)


def test_gradients_reach_both_heads_and_both_kinds_of_rows_but_not_the_targets() -> None:
    inputs = Inputs()
    for target in inputs.targets:
        target.requires_grad_()
    inputs.loss(EQUAL).total.backward()
    for tensor in (inputs.predicted, inputs.context, *(h.weight for h in inputs.heads)):
        assert tensor.grad is not None
        assert tensor.grad.any()
    assert all(target.grad is None for target in inputs.targets)
