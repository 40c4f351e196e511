"""What follows from a recipe for training and for planning alike: sizes of the networks, masks.

encoder, predictor, teacher = network_numbers(recipe, resolved)
"""

from typing import Any

from fastjepa.config.resolve import Resolved
from fastjepa.config.schema import MaskGroup, Recipe
from fastjepa.config.streams import Stream
from fastjepa.masking.batch import MaskMaker
from fastjepa.masking.blocks import Blocks
from fastjepa.observe.flops import EncoderNumbers, PredictorNumbers


def encoder_sizes(recipe: Recipe, resolved: Resolved) -> dict[str, Any]:
    """Keyword arguments that rebuild the encoder; `levels` are all of its norms', supervised or
    not."""
    size = resolved.encoder
    return {
        "width": size.width,
        "depth": size.depth,
        "heads": size.heads,
        "mlp_width": size.mlp_width,
        "levels": list(resolved.norm_levels),
        "patch": recipe.model.patch,
        "tubelet": recipe.model.tubelet,
        "interpolate_rope": recipe.model.interpolate_rope,
        "rope": recipe.model.rope,
        "generation": "2.1",
    }


def network_numbers(
    recipe: Recipe, resolved: Resolved
) -> tuple[EncoderNumbers, PredictorNumbers, EncoderNumbers | None]:
    """Encoder, predictor and teacher (if one gives the targets) as operations are counted from;
    `levels` are the supervised ones."""
    size, shape, model = resolved.encoder, resolved.predictor, recipe.model
    levels = len(size.levels)
    encoder = EncoderNumbers(
        size.width, size.depth, size.heads, size.mlp_width, levels, model.patch, model.tubelet
    )
    teacher = None
    if resolved.teacher is not None:
        other = resolved.teacher
        teacher = EncoderNumbers(
            other.width, other.depth, other.heads, other.mlp_width, 1, model.patch, model.tubelet
        )
    source = teacher or encoder
    predictor = PredictorNumbers(
        shape.width, shape.depth, shape.heads, shape.mlp_width,
        in_width=size.width, in_levels=levels, out_width=source.levels * source.width,
        mask_tokens=model.predictor.mask_tokens,
    )  # fmt: skip
    return encoder, predictor, teacher


def mask_maker(recipe: Recipe, stream: Stream, rank: int = 0) -> MaskMaker:
    """The masks of one stream's batches on a rank."""
    groups: tuple[MaskGroup, ...] = getattr(recipe.masks, stream.modality)
    return MaskMaker(
        groups=tuple(Blocks(**group.model_dump()) for group in groups),
        grid=stream.grid,
        batch=stream.clips,
        seed=recipe.run.seed,
        stream=stream.number,
        rank=rank,
        weigh=recipe.objective.dense and recipe.objective.distance_weights,
        offset=recipe.objective.offset,
        truncate=recipe.masks.truncate,
    )
