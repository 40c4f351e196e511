"""What a step of a recipe costs: tokens, parameters, operations and memory, as plain numbers.

    numbers = estimate(recipe, resolve(recipe))
    numbers.flops, numbers.memory.total

Nothing is built: sizes follow from the recipe, token counts are means over masks drawn for it.
"""

import math
from dataclasses import dataclass, replace

from fastjepa.build import encoder_sizes, mask_maker
from fastjepa.config.resolve import Resolved
from fastjepa.config.schema import Recipe
from fastjepa.config.streams import Stream
from fastjepa.masking.batch import mean_counts
from fastjepa.observe.flops import (
    EncoderNumbers,
    PredictorNumbers,
    StepFlops,
    TokenNumbers,
    encoder_parameters,
    predictor_parameters,
    step_flops,
)
from fastjepa.observe.footprint import Footprint, step_footprint

# Steps whose masks are drawn for the mean token counts.
DRAWN_STEPS = 8


@dataclass(frozen=True)
class Part:
    """One stream's forward and backward: mean tokens a clip by mask group, and their cost.

    `passes` is how many of them an optimizer step holds, on average where steps alternate.
    """

    context: tuple[float, ...]
    predicted: tuple[float, ...]
    passes: float
    flops: StepFlops
    memory: Footprint


@dataclass(frozen=True)
class Estimate:
    """Parameters, and what a step costs: `flops` of an optimizer step, `memory` in bytes.

    `parts` has the streams by name; `memory` is the largest of theirs: they run one after the
    other.
    """

    encoder_parameters: int
    predictor_parameters: int
    parts: dict[str, Part]
    flops: float
    memory: Footprint


def estimate(recipe: Recipe, resolved: Resolved) -> Estimate:
    """The numbers behind `explain`, at the full context weight.

    The context head's small part is counted where the context term is off, too. Raises ValueError
    where masks leave no context or no predictions.
    """
    size, model = resolved.encoder, recipe.model
    encoder = EncoderNumbers(
        size.width, size.depth, size.heads, size.mlp_width, len(size.levels),
        model.patch, model.tubelet,
    )  # fmt: skip
    shape, levels = resolved.predictor, len(size.levels)
    predictor = PredictorNumbers(
        shape.width, shape.depth, shape.heads, shape.mlp_width,
        in_width=size.width, in_levels=levels, out_width=levels * size.width,
        mask_tokens=model.predictor.mask_tokens,
    )  # fmt: skip

    def part(stream: Stream) -> Part:
        maker = replace(mask_maker(recipe, stream), weigh=False)
        counts = mean_counts(maker, range(DRAWN_STEPS))
        context, predicted = tuple(c for c, _ in counts), tuple(p for _, p in counts)
        tokens = TokenNumbers(
            stream.tokens,
            tuple(int(c) for c in context),
            tuple(min(round(p), stream.tokens - int(c)) for c, p in counts),
            image=stream.frames == 1,
        )
        share = stream.share if recipe.data.mix == "alternate" else 1.0
        return Part(
            context,
            predicted,
            share * recipe.optim.accumulate,
            step_flops(
                encoder, predictor, tokens, batch=stream.clips, checkpointing=model.checkpointing
            ),
            step_footprint(
                encoder,
                predictor,
                tokens,
                batch=stream.clips,
                value_bytes=2 if recipe.engine.dtype == "bfloat16" else 4,
                checkpointing=model.checkpointing,
                scores=model.attention == "math",
            ),
        )

    parts = {name: part(stream) for name, stream in resolved.streams.items()}
    every_norm = len(encoder_sizes(recipe, resolved)["levels"])
    return Estimate(
        encoder_parameters(replace(encoder, levels=every_norm)),
        predictor_parameters(predictor),
        parts,
        math.fsum(p.passes * p.flops.total for p in parts.values()),
        max((p.memory for p in parts.values()), key=lambda memory: memory.total),
    )
