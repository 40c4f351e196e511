"""A recipe's streams: videos, videos of other lengths, images; each with its clips and its share.

streams = streams_of(recipe)
streams["video"].grid, streams["video_64f"].share
"""

import math
from dataclasses import dataclass
from typing import Literal

from fastjepa.config.errors import RecipeError
from fastjepa.config.schema import Data, MaskGroup, Recipe

Modality = Literal["video", "image"]


@dataclass(frozen=True)
class Stream:
    """Clips of one kind as the model sees them: `frames` x `crop` x `crop` pixels in tokens.

    `modality` names its data and masks in the recipe; `number` sets its random draws apart (videos
    and images keep theirs whatever lengths are added). `grid` is (T', H', W'), `tokens` their
    product, `clips` the batch of one forward, `share` the stream's weight in an update,
    `context_weight` the final lambda of its context loss.
    """

    modality: Modality
    number: int
    frames: int
    fps: float
    crop: int
    grid: tuple[int, int, int]
    tokens: int
    clips: int
    share: float
    context_weight: float


def streams_of(recipe: Recipe) -> dict[str, Stream]:
    """The streams with data and a share, by name: `video`, `video_64f` and so on, then `image`.

    Raises RecipeError naming key, value and what fits for sizes, shares and masks that cannot be.
    """
    data, patch, tubelet = recipe.data, recipe.model.patch, recipe.model.tubelet
    images = _image_share(data, recipe.ranks.rank_ratio)
    _check_sizes(data, patch, tubelet, videos=images < 1.0)

    def stream(
        modality: Modality,
        number: int,
        frames: int,
        fps: float,
        crop: int,
        clips: int,
        share: float,
    ) -> Stream:
        time = frames // tubelet if modality == "video" else 1
        grid = (time, crop // patch, crop // patch)
        weight: float = getattr(recipe.objective.context_weight, modality)
        return Stream(
            modality, number, frames, fps, crop, grid, math.prod(grid), clips, share,
            weight if recipe.objective.dense else 0.0,
        )  # fmt: skip

    videos, usual = 1.0 - images, 1.0 - _share_of_lengths(data)
    found = {
        "video": stream("video", 0, data.frames, data.fps, data.crop, data.batch, videos * usual)
    }
    for number, length in enumerate(data.lengths, start=2):
        found[f"video_{length.frames}f"] = stream(
            "video", number, length.frames, length.fps or data.fps, length.crop or data.crop,
            length.batch, videos * length.share,
        )  # fmt: skip
    image_crop = data.image_crop or data.crop
    found["image"] = stream("image", 1, 1, data.fps, image_crop, data.image_batch, images)
    found = {name: one for name, one in found.items() if one.share > 0.0}
    for one in found.values():
        groups: tuple[MaskGroup, ...] = getattr(recipe.masks, one.modality)
        for index, group in enumerate(groups):
            _check_group(f"masks.{one.modality}.{index}", group, one.grid)
    return found


def _image_share(data: Data, rank_ratio: float | None) -> float:
    """Share of images in an update: as given, or 0 or 1 when only one modality has data."""
    if not data.video and not data.image:
        raise RecipeError(
            "data.video: no data: data.video and data.image are both empty; give a path to one"
        )
    if rank_ratio is not None:
        _check_roles(data, rank_ratio)
        return rank_ratio
    if not data.image:
        return 0.0
    return data.image_share if data.video else 1.0


def _check_roles(data: Data, rank_ratio: float) -> None:
    if not (data.video and data.image):
        empty = "data.image" if data.video else "data.video"
        raise RecipeError(
            f"ranks.rank_ratio: {rank_ratio:g} splits ranks into those of images and those of "
            f"videos, but {empty} is empty; give it a path, or leave rank_ratio out"
        )
    if data.lengths and data.mix == "accumulate":
        # All ranks reduce after every micro-batch: an image rank has none to match these.
        raise RecipeError(
            "data.mix: accumulate gives video ranks a micro-batch for each of data.lengths, which "
            "image ranks do not have; expected alternate beside ranks.rank_ratio"
        )


def _share_of_lengths(data: Data) -> float:
    total = math.fsum(length.share for length in data.lengths)
    if total >= 1.0:
        raise RecipeError(
            f"data.lengths: shares add up to {total:g}, which leaves nothing to clips of "
            f"data.frames {data.frames}; expected a sum below 1"
        )
    return total


def _check_sizes(data: Data, patch: int, tubelet: int, *, videos: bool) -> None:
    sizes = [("data.frames", data.frames, "data.crop", data.crop)]
    sizes += [
        (f"data.lengths.{i}.frames", one.frames, f"data.lengths.{i}.crop", one.crop or data.crop)
        for i, one in enumerate(data.lengths)
    ]
    seen: dict[int, str] = {}
    for frames_key, frames, crop_key, crop in sizes:
        _check_multiple(frames_key, frames, "model.tubelet", tubelet)
        _check_multiple(crop_key, crop, "model.patch", patch)
        if frames == 1 and videos:
            raise RecipeError(f"{frames_key}: 1 is an image to the tokenizer; expected at least 2")
        if frames in seen:
            raise RecipeError(
                f"{frames_key}: {frames} is {seen[frames]} already; give each length once"
            )
        seen[frames] = frames_key
    if data.image_crop is not None:
        _check_multiple("data.image_crop", data.image_crop, "model.patch", patch)


def _check_multiple(key: str, value: int, of_key: str, of: int) -> None:
    if value % of:
        below = value // of * of
        fits = f"{below} or {below + of}" if below else f"{of}"
        raise RecipeError(f"{key}: {value} is no multiple of {of_key} {of}; {fits} would be")


def _check_group(key: str, group: MaskGroup, grid: tuple[int, int, int]) -> None:
    time, height, width = grid
    if int(height * width * group.spatial_scale[0]) < 1:
        raise RecipeError(
            f"{key}.spatial_scale: {list(group.spatial_scale)} of {height}x{width} tokens "
            f"can be none; expected at least {1 / (height * width):.3g}"
        )
    if int(time * group.max_temporal_keep) < 1:
        raise RecipeError(
            f"{key}.max_temporal_keep: {group.max_temporal_keep} of {time} steps in time "
            f"keeps none; expected at least {1 / time:.3g}"
        )
