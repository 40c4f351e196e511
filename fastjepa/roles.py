"""What each rank trains on: every stream, or images alone or videos alone (`ranks.rank_ratio`).

share = share_of(recipe, resolved, rank=3, ranks=8)
share.streams["video"].clips, share.rank, share.ranks, share.weight
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from fastjepa.config.resolve import Resolved
from fastjepa.config.schema import Recipe
from fastjepa.config.streams import Stream
from fastjepa.estimate import StreamCosts
from fastjepa.planning.balance import Costs, Roles, by_ratio, by_work, num_image_ranks

# Rounds in which the batches of balanced ranks settle.
_ROUNDS = 4


@dataclass(frozen=True)
class RankShare:
    """One rank's part of every step.

    `streams` are those it takes, their shares adding up to 1; it is `rank` of the `ranks` that
    take the same. `weight` scales its loss in the mean over all ranks. `samples_per_step` counts
    every stream over all ranks, on average where steps alternate.
    """

    streams: dict[str, Stream]
    mix: Literal["alternate", "accumulate"]
    rank: int
    ranks: int
    weight: float
    samples_per_step: dict[str, float]


def share_of(
    recipe: Recipe, resolved: Resolved, *, rank: int, ranks: int, even: Roles | None = None
) -> RankShare:
    """The part of `rank`, one of `ranks`; the first ones take images where there are roles.

    `even` is the split of `ranks.balance: work` where it is known already. Raises ValueError for a
    `ranks.rank_ratio` that leaves images or videos without a rank, and for `ranks.balance: work`
    where no split is even.
    """
    mix, streams, ratio = resolved.mix, resolved.streams, recipe.ranks.rank_ratio
    accumulate = recipe.optim.accumulate
    if ratio is None or ranks == 1:
        samples = _samples(streams, mix, accumulate * ranks)
        return RankShare(streams, mix, rank, ranks, 1.0, samples)
    images, weights = num_image_ranks(ranks, ratio), {"image": 1.0, "video": 1.0}
    if recipe.ranks.balance == "work":
        even = even or even_roles(StreamCosts(recipe, resolved), streams, ranks, ratio)
        images, roles = even.image.ranks, {"image": even.image, "video": even.video}
        weights = {name: role.factor for name, role in roles.items()}
        streams = {name: replace(one, clips=roles[name].batch) for name, one in streams.items()}
    taken = {"image": _of_modality(streams, "image"), "video": _of_modality(streams, "video")}
    places = {"image": (rank, images), "video": (rank - images, ranks - images)}
    own = "image" if rank < images else "video"
    return RankShare(
        taken[own], mix, *places[own], weights[own],
        _samples(taken["video"], mix, accumulate * (ranks - images))
        | _samples(taken["image"], mix, accumulate * images),
    )  # fmt: skip


def _of_modality(streams: Mapping[str, Stream], modality: str) -> dict[str, Stream]:
    found = {name: one for name, one in streams.items() if one.modality == modality}
    total = math.fsum(one.share for one in found.values())
    return {name: replace(one, share=one.share / total) for name, one in found.items()}


def _samples(streams: Mapping[str, Stream], mix: str, times: int) -> dict[str, float]:
    found = {}
    for name, stream in streams.items():
        mean = stream.clips * times * (stream.share if mix == "alternate" else 1.0)
        found[name] = round(mean) if math.isclose(mean, round(mean)) else mean
    return found


def even_roles(
    costs: StreamCosts, streams: Mapping[str, Stream], ranks: int, ratio: float
) -> Roles:
    """The split of equal work.

    A batch's size changes what its masks leave a clip, so costs are taken again at the batches
    found, until these stay. Raises ValueError for streams other than `video` and `image`.
    """
    batches = _batches(streams)
    for _ in range(_ROUNDS):
        even = _split(by_work, costs, streams, ranks, ratio, at=batches)
        found = even.image.batch, even.video.batch
        if found == batches:
            break
        batches = found
    return replace(even, costs=_costs_at(costs, streams, *batches))


def given_roles(
    costs: StreamCosts, streams: Mapping[str, Stream], ranks: int, ratio: float
) -> Roles:
    """The reference's split, batches as in the recipe; raises ValueError as `even_roles` does."""
    return _split(by_ratio, costs, streams, ranks, ratio, at=_batches(streams))


def _batches(streams: Mapping[str, Stream]) -> tuple[int, int]:
    if set(streams) != {"video", "image"}:
        raise ValueError(
            "ranks.balance: work is counted for the streams video and image, this recipe has "
            f"{', '.join(streams)}; expected no data.lengths, or ratio"
        )
    return streams["image"].clips, streams["video"].clips


def _costs_at(costs: StreamCosts, streams: Mapping[str, Stream], images: int, videos: int) -> Costs:
    one, other = (
        costs.part(replace(streams[name], clips=clips)).flops.total / clips
        for name, clips in (("image", images), ("video", videos))
    )
    return Costs(image=one, video=other)


def _split(
    of: Callable[..., Roles],
    costs: StreamCosts,
    streams: Mapping[str, Stream],
    ranks: int,
    ratio: float,
    *,
    at: tuple[int, int],
) -> Roles:
    return of(
        ranks, ratio, image_batch=streams["image"].clips, video_batch=streams["video"].clips,
        costs=_costs_at(costs, streams, *at),
    )  # fmt: skip
