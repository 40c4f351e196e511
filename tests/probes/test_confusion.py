"""The confusion matrix and mIoU, by hand and against scikit-learn."""

import pytest
import torch

from fastjepa.probes.confusion import class_ious, confusion, mean_iou


def test_a_case_by_hand() -> None:
    labels = torch.tensor([[0, 0, 1], [1, 2, 255]])
    guess = torch.tensor([[0, 1, 1], [1, 1, 0]])
    counts = confusion(guess, labels, 4)
    assert counts.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    # Class 0: 1 of 2; class 1: 2 of 4; class 2: 0 of 1; class 3 is nowhere.
    ious = class_ious(counts)
    assert ious[:3].tolist() == [0.5, 0.5, 0.0]
    assert ious[3].isnan()
    assert mean_iou(counts) == pytest.approx(1 / 3)


def test_it_is_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    random = torch.Generator().manual_seed(0)
    labels, guess = (torch.randint(5, (1000,), generator=random) for _ in range(2))
    counts = confusion(guess, labels, 5)
    assert counts.tolist() == metrics.confusion_matrix(labels, guess).tolist()
    assert mean_iou(counts) == pytest.approx(metrics.jaccard_score(labels, guess, average="macro"))


def test_a_label_that_is_no_class_is_named() -> None:
    with pytest.raises(ValueError, match=r"expected 0 to 2, or 255 for ignored, found 0 to 7"):
        confusion(torch.zeros(2), torch.tensor([0, 7]), 3)
