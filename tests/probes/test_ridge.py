"""Ridge regression from sums equals the one of scikit-learn on all samples at once."""

import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

from fastjepa.probes.ridge import Moments, explained, ridge


def moments(x_ND: torch.Tensor, y_N: torch.Tensor) -> Moments:
    found = Moments(x_ND.shape[1])
    for x, y in zip(x_ND.split(7), y_N.split(7), strict=True):
        found.add(x, y)
    return found


def problem(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(count, 6, generator=generator) * torch.tensor([1, 5, 0.1, 1, 1, 2]) + 3.0
    noise = torch.randn(count, generator=generator)
    return x_ND, x_ND[:, 0] - 0.3 * x_ND[:, 1] + 4.0 * x_ND[:, 2] + 0.5 * noise


@pytest.mark.parametrize("penalty", [1e-4, 1e-2, 1.0])
def test_it_is_the_ridge_of_all_samples(penalty: float) -> None:
    x, y = problem(200, 0)
    tx, ty = problem(100, 1)
    mean, std = x.mean(0), x.std(0, correction=0)
    theirs = Ridge(alpha=penalty * 200).fit(((x - mean) / std).double(), y.double())
    wanted = theirs.predict(((tx - mean) / std).double())
    found = ridge(moments(x, y), penalty)
    ours = tx.double() @ found[:-1] + found[-1]
    assert torch.allclose(ours, torch.from_numpy(wanted), rtol=1e-5, atol=1e-5)
    score = explained(found, moments(tx, ty))
    assert score == pytest.approx(r2_score(ty.double(), wanted), abs=1e-6)


def test_channels_that_never_change_do_no_harm() -> None:
    x, y = problem(200, 0)
    constant = torch.full((200, 1), 7.0)
    with_constant = ridge(moments(torch.cat([x, constant], 1), y))
    assert with_constant[-2].abs() < 1e-9
    assert torch.allclose(with_constant[:6], ridge(moments(x, y))[:6], rtol=1e-4)


def test_features_that_know_nothing_explain_nothing() -> None:
    x = torch.zeros(50, 3)
    y = torch.arange(50.0)
    assert explained(ridge(moments(x, y)), moments(x, y)) == pytest.approx(0.0, abs=1e-9)
