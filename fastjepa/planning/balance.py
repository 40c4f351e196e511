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
    """The ranks of one modality: samples of each, and the factor of each rank's mean loss.

    With these factors the mean of all ranks' gradients weighs the modality by its `share` and each
    of its samples alike.
    """

    share: float
    batches: tuple[int, ...]
    factors: tuple[float, ...]

    @property
    def samples(self) -> int:
        return sum(self.batches)


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
    def work(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Work of each image rank and of each video rank."""
        return (
            tuple(self.costs.image * batch for batch in self.image.batches),
            tuple(self.costs.video * batch for batch in self.video.batches),
        )

    @property
    def spread(self) -> float:
        """How much more work the busiest rank has than the idlest, as a share of the latter's."""
        images, videos = self.work
        return max(images + videos) / min(images + videos) - 1.0


def by_ratio(
    ranks: int, ratio: float, *, image_batch: int, video_batch: int, costs: Costs
) -> Roles:
    """The reference's split: the first int(ranks * ratio) ranks on images, all batches as given.

    Raises ValueError when one of the modalities would have no rank.
    """
    images = int(ranks * ratio)
    if not 0 < images < ranks:
        raise ValueError(
            f"rank ratio {ratio:g} of {ranks} ranks leaves {images} for images and "
            f"{ranks - images} for videos; both need one"
        )
    return _roles(images / ranks, (image_batch,) * images, (video_batch,) * (ranks - images), costs)


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
    for image_batches, video_batches in _splits(ranks, old, costs):
        new = _roles(old.image.share, image_batches, video_batches, costs)
        evenest = min(evenest, new, key=lambda roles: roles.spread)
        change = sum(
            abs(now.samples / before.samples - 1.0)
            for now, before in ((new.image, old.image), (new.video, old.video))
        )
        if new.spread <= tolerance and (best is None or (change, new.spread) < best[:2]):
            best = change, new.spread, new
    if best is None:
        raise ValueError(
            f"no split of {ranks} ranks into image and video ranks is even to {tolerance:.0%}: "
            f"the best is {evenest.spread:.1%}, with {len(evenest.image.batches)} image ranks; "
            "larger batches leave more choice"
        )
    return best[2]


def _splits(
    ranks: int, old: Roles, costs: Costs
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Batches by rank: for each number of image ranks the old totals, the nearest that leave all
    ranks of a modality the same batch, and the images that match a video rank's work."""
    for images in range(1, ranks):
        videos = ranks - images
        for clips in _totals(old.video.samples, videos):
            like_video = costs.video * clips / videos / costs.image
            for pictures in (*_totals(old.image.samples, images), images * round(like_video)):
                if clips >= videos and pictures >= images:
                    yield _dealt(pictures, images), _dealt(clips, videos)


def _totals(samples: int, ranks: int) -> tuple[int, int, int]:
    each = samples // ranks
    return samples, each * ranks, (each + 1) * ranks


def _dealt(samples: int, ranks: int) -> tuple[int, ...]:
    """As evenly as whole samples go."""
    each, more = divmod(samples, ranks)
    return (each + 1,) * more + (each,) * (ranks - more)


def _roles(
    image_share: float, image: tuple[int, ...], video: tuple[int, ...], costs: Costs
) -> Roles:
    ranks = len(image) + len(video)

    def role(share: float, batches: tuple[int, ...]) -> Role:
        factor = ranks * share / sum(batches)
        return Role(share, batches, tuple(factor * batch for batch in batches))

    return Roles(role(image_share, image), role(1.0 - image_share, video), costs)
