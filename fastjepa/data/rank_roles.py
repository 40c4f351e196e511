"""Which ranks read images and which videos, where the two share out the ranks and not the steps.

    role = role_of(rank=3, ranks=8, image_ratio=0.25)     # the second of six video ranks
    Loader(..., rank=role.rank, ranks=role.ranks)

The first `int(ranks * image_ratio)` ranks read images, the others videos (the reference's
`rank_ratio`). Gradients are averaged over all ranks, so that images weigh `image_ranks / ranks` in
an update.
"""

from typing import Literal, NamedTuple


class Role(NamedTuple):
    """What a rank reads, and its place among the `ranks` that read the same."""

    modality: Literal["video", "image"]
    rank: int
    ranks: int


def role_of(rank: int, ranks: int, image_ratio: float) -> Role:
    """The role of `rank`, one of `ranks`; a ratio of 0 or 1 leaves one modality alone.

    Raises ValueError for a rank that is not there, and for a ratio that would leave images or
    videos without a rank.
    """
    if not 0 <= rank < ranks:
        raise ValueError(f"rank is {rank}, expected 0 to ranks - 1 = {ranks - 1}")
    if not 0.0 <= image_ratio <= 1.0:
        raise ValueError(f"image_ratio is {image_ratio}, expected 0 to 1")
    image_ranks = int(ranks * image_ratio)
    if image_ratio > 0.0 and not image_ranks:
        raise ValueError(
            f"image_ratio {image_ratio:g} of {ranks} ranks leaves none to images; "
            f"expected at least {1 / ranks:.3g}, or 0"
        )
    if rank < image_ranks:
        return Role("image", rank, image_ranks)
    return Role("video", rank - image_ranks, ranks - image_ranks)
