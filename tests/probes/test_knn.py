"""k-NN: cosine neighbours, weighted votes; checked by hand and against scikit-learn."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastjepa.probes.knn import accuracy, knn


def test_the_direction_counts_and_not_the_length() -> None:
    bank = torch.tensor([[100.0, 0.0], [0.0, 0.1]])
    query = torch.tensor([[0.1, 1.0], [3.0, 1.0]])
    assert knn(bank, torch.tensor([7, 2]), query, ks=[1])[1].tolist() == [2, 7]


def test_near_neighbours_outvote_more_numerous_far_ones() -> None:
    # One neighbour in the query's direction, two at 60 degrees: exp(-0.5 / T) each.
    bank = torch.tensor([[1.0, 0.0], [0.5, 0.75**0.5], [0.5, -(0.75**0.5)]])
    labels, query = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]])
    assert knn(bank, labels, query, ks=[3], temperature=0.07)[3].tolist() == [0]
    assert knn(bank, labels, query, ks=[3], temperature=10.0)[3].tolist() == [1]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 12), classes=st.integers(2, 5))
def test_it_votes_as_scikit_learn_does(seed: int, k: int, classes: int) -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    random = torch.Generator().manual_seed(seed)
    bank = torch.randn(30, 6, generator=random, dtype=torch.float64)
    queries = torch.randn(20, 6, generator=random, dtype=torch.float64)
    labels = torch.randint(classes, (30,), generator=random)
    other = neighbors.KNeighborsClassifier(
        k, metric="cosine", weights=lambda distance: torch.exp(
            -torch.from_numpy(distance) / 0.07
        ).numpy()
    ).fit(bank.numpy(), labels.numpy())  # fmt: skip
    chances = torch.from_numpy(other.predict_proba(queries.numpy()))
    clear = chances.sort(dim=1).values
    clear = (clear[:, -1] - clear[:, -2] > 1e-4) if clear.shape[1] > 1 else clear[:, 0] > 0
    expected = torch.from_numpy(other.predict(queries.numpy()))
    assert torch.equal(knn(bank, labels, queries, ks=[k])[k][clear], expected[clear])


def test_a_k_beyond_the_bank_is_left_out() -> None:
    bank, labels = torch.eye(3), torch.tensor([0, 1, 2])
    assert list(knn(bank, labels, bank, ks=[1, 3, 20])) == [1, 3]
    with pytest.raises(ValueError, match=r"ks is \[20\], expected some from 1 to 3"):
        knn(bank, labels, bank, ks=[20])


def test_what_does_not_fit_is_refused() -> None:
    bank, labels = torch.eye(3), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"bank \[N, D\] and queries \[M, D\], found \(3, 3\)"):
        knn(bank, labels, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"\(2,\) labels for 3 samples"):
        knn(bank, labels[:2], bank)
    with pytest.raises(ValueError, match="temperature is 0, expected more than 0"):
        knn(bank, labels, bank, temperature=0)


def test_accuracy_is_the_share_that_is_right() -> None:
    assert accuracy(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 0])) == 0.75
