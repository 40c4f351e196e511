"""Linear depth: errors by hand; a depth that one channel tells is learnt."""

import math

import pytest
import torch
from torch import Tensor, nn

from fastjepa.probes.linear_depth import DepthHead, depth_errors, depth_loss, depth_sweep
from fastjepa.probes.patch_linear import Labelled, in_memory
from fastjepa.probes.sweep import Setting


class Says(nn.Module):
    """A head that says one depth for all patches."""

    def __init__(self, metres: float) -> None:
        super().__init__()
        self.metres = metres

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        return [torch.full((1, *x.shape[:2]), self.metres) for x in features]


def test_errors_by_hand() -> None:
    labels = torch.tensor([[[1.0, 2.0], [0.0, 4.0]], [[2.0, 2.0], [2.0, 99.0]]])
    errors = depth_errors(Says(2.0), in_memory(torch.zeros(2, 1, 1, 3), labels), 0.5, 10.0)
    # First picture: 1 too much, right, 2 too little; second: all right. 0 and 99 are left out.
    assert errors.rmse == pytest.approx(math.sqrt(5 / 3) / 2)
    assert errors.abs_rel == pytest.approx((1.0 + 0.0 + 0.5) / 3 / 2)
    assert errors.delta1 == pytest.approx((1 / 3 + 1.0) / 2)


def test_the_loss_by_hand() -> None:
    labels = torch.tensor([[1.0, 4.0]])
    batch = Labelled([torch.zeros(1, 1, 3)], [labels])
    # Log ratios are log 2 and -log 2: mean 0, variance (log 2)^2.
    assert depth_loss(Says(2.0), batch, 0.5, 10.0).item() == pytest.approx(math.log(2), rel=1e-4)
    # Twice too far everywhere costs sqrt(0.15) log 2: the shape is right.
    far = Labelled(batch.features, [torch.full((2, 2), 1.0)])
    loss = depth_loss(Says(2.0), far, 0.5, 10.0).item()
    assert loss == pytest.approx(math.sqrt(0.15) * math.log(2), rel=1e-3)


def test_a_head_stays_between_its_limits() -> None:
    head = DepthHead(5, 1.0, 3.0).eval()
    (depth,) = head([100 * torch.randn(4, 6, 5)])
    assert depth.shape == (1, 4, 6)
    assert 1.0 <= depth.min() <= depth.max() <= 3.0


def test_a_depth_that_the_features_tell_is_learnt() -> None:
    random = torch.Generator().manual_seed(0)
    depth = 1.0 + 3.0 * torch.rand(64, 1, 1, generator=random)
    features = torch.randn(64, 4, 4, 8, generator=random) * 0.1
    features[..., 0] += depth
    samples = in_memory(features, depth.expand(-1, 16, 16))
    sweep = depth_sweep(8, 0.5, 5.0, settings=[Setting(1e-2, 1e-3)], epochs=12, batch=8)
    before = depth_errors(sweep.heads[0].eval(), samples, 0.5, 5.0)
    sweep.train(samples)
    after = depth_errors(sweep.heads[0], samples, 0.5, 5.0)
    assert after.rmse < 0.5 * before.rmse
    assert after.delta1 > 0.9


def test_pictures_without_depth_teach_nothing_and_are_not_scored() -> None:
    samples = in_memory(torch.randn(2, 2, 2, 4), torch.zeros(2, 8, 8))
    head = DepthHead(4, 0.5, 5.0)
    assert depth_loss(head, samples.fetch(torch.tensor([0, 1])), 0.5, 5.0).item() == 0.0
    with pytest.raises(ValueError, match=r"no pixel of the labels is from 0.5 to 5.0 metres"):
        depth_errors(head, samples, 0.5, 5.0)
    with pytest.raises(ValueError, match=r"expected 0 < low < high, found 0.0 and 5.0"):
        depth_sweep(4, 0.0, 5.0)
