"""Image and video ranks: the reference's split, the even one, and the gradient both stand for."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastjepa.planning.balance import Costs, Roles, by_ratio, by_work

# The released batches; operations of an image and of a clip as counted on the official code.
RELEASED = {
    "ViT-B": (64, 144, 96, Costs(14 / 144, 164 / 96)),
    "ViT-L": (128, 72, 48, Costs(23 / 72, 231 / 48)),
    "ViT-g": (128, 72, 48, Costs(67 / 72, 559 / 48)),
    "ViT-G": (256, 36, 24, Costs(61 / 36, 488 / 24)),
}


def both(ranks: int, image_batch: int, video_batch: int, costs: Costs) -> tuple[Roles, Roles]:
    known = {"image_batch": image_batch, "video_batch": video_batch, "costs": costs}
    return by_ratio(ranks, 0.5, **known), by_work(ranks, 0.5, **known)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", RELEASED)
def test_released_image_ranks_wait_and_balanced_ones_do_not(name: str) -> None:
    released, even = both(*RELEASED[name])
    images, videos = released.work
    assert 0.08 < images / videos < 0.13
    assert even.spread <= 0.05
    assert even.image.ranks + even.video.ranks == RELEASED[name][0]
    assert even.image.samples == pytest.approx(released.image.samples, rel=0.05)
    assert even.video.samples == pytest.approx(released.video.samples, rel=0.05)
    assert even.image.share == released.image.share == 0.5


def summed(roles: Roles, image: Tensor, video: Tensor) -> Tensor:
    """What averaging over ranks makes of the samples' gradients [samples, values]: each rank takes
    its own samples, and scales its mean loss by its factor."""
    ranks = [
        role.factor * samples.mean(0)
        for role, gradients in ((roles.image, image), (roles.video, video))
        for samples in gradients.split(role.batch)
    ]
    return torch.stack(ranks).mean(0)


@pytest.mark.parametrize("name", RELEASED)
def test_both_splits_weigh_images_and_videos_alike_in_the_gradient(name: str) -> None:
    torch.manual_seed(0)
    for roles in both(*RELEASED[name]):
        image = torch.randn(roles.image.samples, 3, dtype=torch.float64)
        video = torch.randn(roles.video.samples, 3, dtype=torch.float64)
        torch.testing.assert_close(
            summed(roles, image, video), 0.5 * image.mean(0) + 0.5 * video.mean(0)
        )


def test_the_references_factors_are_one() -> None:
    """There each rank's gradient counts the same, and the share is that of whole ranks."""
    roles = by_ratio(10, 0.37, image_batch=5, video_batch=2, costs=Costs(1.0, 4.0))
    assert (roles.image.ranks, roles.image.share) == (3, 0.3)
    assert (roles.image.factor, roles.video.factor) == pytest.approx((1.0, 1.0))


def test_a_split_that_is_even_already_stays() -> None:
    before, after = both(8, 10, 10, Costs(1.0, 1.0))
    assert after == before


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 24), st.floats(0.05, 0.95), st.integers(1, 64), st.integers(1, 64),
    st.floats(0.01, 10.0),
)  # fmt: skip
def test_what_is_called_even_is_even(
    ranks: int, ratio: float, image_batch: int, video_batch: int, cost: float
) -> None:
    assume(0 < int(ranks * ratio) < ranks)
    known = {"image_batch": image_batch, "video_batch": video_batch, "costs": Costs(cost, 1.0)}
    try:
        even = by_work(ranks, ratio, **known)  # type: ignore[arg-type]
    except ValueError as error:
        assert "even to 5%" in str(error)  # noqa: PT017
        return
    assert even.image.ranks + even.video.ranks == ranks
    assert max(even.work) / min(even.work) <= 1.05 + 1e-9
    assert min(even.image.batch, even.video.batch) >= 1
    share = int(ranks * ratio) / ranks
    assert even.image.factor * even.image.ranks / ranks == pytest.approx(share)
    assert even.video.factor * even.video.ranks / ranks == pytest.approx(1 - share)


def test_a_ratio_without_images_or_without_videos_is_refused() -> None:
    for ranks, ratio in ((1, 0.5), (8, 0.1), (8, 1.0)):
        with pytest.raises(ValueError, match="both need one"):
            by_work(ranks, ratio, image_batch=4, video_batch=4, costs=Costs(1.0, 1.0))


def test_work_that_no_split_makes_even_is_refused_with_the_best_there_is() -> None:
    with pytest.raises(ValueError, match=r"2 ranks .* even to 5%: the best is 40\.0%, with 1"):
        by_work(2, 0.5, image_batch=1, video_batch=1, costs=Costs(1.4, 1.0))
