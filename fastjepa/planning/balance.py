"""Image ranks and video ranks: how many of each, with which batches, so that none waits long.

In the reference a share of the ranks trains on images and the rest on videos, each with a batch of
its own, and gradients are averaged over all ranks. An image rank then does about a tenth of a
video rank's work and waits. `by_work` keeps the weights of images and videos in the gradient and
makes the ranks' work alike: fewer image ranks, with larger batches.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Role:
    """The ranks of one modality: how many, samples of each, and the factor of each one's mean loss.

    With the factors the mean of all ranks' gradients weighs the modality by its `share`.
    """

    share: float
    ranks: int
    batch: int
    factor: float

    @property
    def samples(self) -> int:
        return self.ranks * self.batch


@dataclass(frozen=True)
class Costs:
    """Work of one sample of each modality, in any unit (operations, seconds)."""

    image: float
    video: float


@dataclass(frozen=True)
class Roles:
    """Image ranks come first, as in the reference. `costs` are what the work is counted in."""

    image: Role
    video: Role
    costs: Costs

    @property
    def work(self) -> tuple[float, float]:
        """Work of an image rank and of a video rank."""
        return self.costs.image * self.image.batch, self.costs.video * self.video.batch

    @property
    def spread(self) -> float:
        """How much more work the busiest rank has than the idlest, as a share of the latter's."""
        return max(self.work) / min(self.work) - 1.0


def num_image_ranks(ranks: int, ratio: float) -> int:
    """How many of the ranks the reference gives to images: int(ranks * ratio).

    Raises ValueError when one of the modalities would have no rank.
    """
    images = int(ranks * ratio)
    if not 0 < images < ranks:
        raise ValueError(
            f"ranks.rank_ratio: {ratio:g} of {ranks} ranks leaves {images} for images and "
            f"{ranks - images} for videos; both need one"
        )
    return images


def by_ratio(
    ranks: int, ratio: float, *, image_batch: int, video_batch: int, costs: Costs
) -> Roles:
    """The reference's split: the first int(ranks * ratio) ranks on images, all batches as given.

    Raises ValueError as `num_image_ranks` does.
    """
    images = num_image_ranks(ranks, ratio)
    return _roles(images / ranks, images, ranks, image_batch, video_batch, costs)


def by_work(
    ranks: int,
    ratio: float,
    *,
    image_batch: int,
    video_batch: int,
    costs: Costs,
    tolerance: float = 0.05,
) -> Roles:
    """Ranks and batches of equal work, to `tolerance`, at the gradient weights of `by_ratio`.

    Of all splits within the tolerance, the one that changes the samples of an update least, then
    the most even one. Raises ValueError as `by_ratio` does, and where no split is even enough.
    """
    old = by_ratio(ranks, ratio, image_batch=image_batch, video_batch=video_batch, costs=costs)
    best: tuple[float, float, Roles] | None = None
    evenest = old
    for images, image_size, video_size in _splits(ranks, old, costs):
        new = _roles(old.image.share, images, ranks, image_size, video_size, costs)
        evenest = min(evenest, new, key=lambda roles: roles.spread)
        change = sum(
            abs(now.samples / before.samples - 1.0)
            for now, before in ((new.image, old.image), (new.video, old.video))
        )
        if new.spread <= tolerance and (best is None or (change, new.spread) < best[:2]):
            best = change, new.spread, new
    if best is None:
        raise ValueError(
            f"ranks.balance: no split of {ranks} ranks into image and video ranks is even to "
            f"{tolerance:.0%}: the best is {evenest.spread:.1%}, with {evenest.image.ranks} image "
            "ranks; larger batches leave more choice"
        )
    return best[2]


def _splits(ranks: int, old: Roles, costs: Costs) -> Iterator[tuple[int, int, int]]:
    """Image ranks and the batches of an image and of a video rank: for each number of image ranks
    the batches nearest to the old totals, and the images that match a video rank's work."""
    for images in range(1, ranks):
        for clips in _near(old.video.samples, ranks - images):
            like_video = round(costs.video * clips / costs.image)
            for pictures in (*_near(old.image.samples, images), like_video):
                if clips and pictures:
                    yield images, pictures, clips


def _near(samples: int, ranks: int) -> tuple[int, int]:
    each = samples // ranks
    return each, each + 1


def _roles(
    image_share: float, images: int, ranks: int, image_batch: int, video_batch: int, costs: Costs
) -> Roles:
    videos, video_share = ranks - images, 1.0 - image_share
    return Roles(
        Role(image_share, images, image_batch, ranks * image_share / images),
        Role(video_share, videos, video_batch, ranks * video_share / videos),
        costs,
    )
