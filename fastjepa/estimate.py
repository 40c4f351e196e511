"""What a step of a recipe costs: tokens, parameters, operations and memory, as plain numbers.

    numbers = estimate(recipe, resolve(recipe))
    numbers.flops, numbers.memory.total

Nothing is built: sizes follow from the recipe, token counts from masks drawn for it.
"""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from statistics import fmean

from fastjepa.config.resolve import Resolved
from fastjepa.config.schema import Recipe
from fastjepa.config.streams import Stream
from fastjepa.masking.batch import counts
from fastjepa.observe.flops import (
    Checkpointing,
    StepFlops,
    TokenNumbers,
    encoder_parameters,
    mean_flops,
    predictor_parameters,
    step_flops,
)
from fastjepa.observe.footprint import Activations, Footprint, step_activations
from fastjepa.observe.states import Layout, state_bytes
from fastjepa.recipe_parts import encoder_sizes, mask_maker, network_numbers

# Steps whose masks are drawn for the token counts.
DRAWN_STEPS = 8
# Of larger batches only so many clips are drawn: a clip keeps hardly fewer tokens in them.
MOST_DRAWN = 512


@dataclass(frozen=True)
class Part:
    """One stream's forward and backward: mean tokens a clip by mask group, and their cost.

    `passes` is how many of them an optimizer step holds, on average where steps alternate.
    `memory` is that of the largest of the steps drawn.
    """

    context: tuple[float, ...]
    predicted: tuple[float, ...]
    passes: float
    flops: StepFlops
    memory: Footprint


@dataclass(frozen=True)
class Estimate:
    """Parameters, and what a step costs: `flops` of an optimizer step, `memory` in bytes.

    `teacher_parameters` is 0 where no teacher gives the targets. `parts` has the streams by name;
    `memory` is the largest of theirs where they run one after the other.
    """

    encoder_parameters: int
    predictor_parameters: int
    teacher_parameters: int
    parts: dict[str, Part]
    flops: float
    memory: Footprint


def estimate(recipe: Recipe, resolved: Resolved) -> Estimate:
    """The numbers behind `explain`, at the full context weight.

    The context head's small part is counted where the context term is off, too. Raises ValueError
    where masks leave no context or no predictions.
    """
    costs = StreamCosts(recipe, resolved)
    parts = {name: costs.part(stream) for name, stream in resolved.streams.items()}
    return Estimate(
        costs.encoder_parameters,
        costs.predictor_parameters,
        costs.teacher_parameters,
        parts,
        math.fsum(p.passes * p.flops.total for p in parts.values()),
        Footprint(
            next(iter(parts.values())).memory.states,
            costs.at_the_height([p.memory.activations for p in parts.values()]),
        ),
    )


class StreamCosts:
    """What a recipe's networks cost on clips of any stream and batch."""

    def __init__(self, recipe: Recipe, resolved: Resolved) -> None:
        self.recipe = recipe
        self._alternates = resolved.mix == "alternate"
        self.encoder, self.predictor, self.teacher = network_numbers(recipe, resolved)
        every_norm = len(encoder_sizes(recipe, resolved)["levels"])
        self.encoder_parameters = encoder_parameters(replace(self.encoder, levels=every_norm))
        self.predictor_parameters = predictor_parameters(self.predictor)
        # A teacher of the released kind has a norm for each of four levels.
        self.teacher_parameters = (
            encoder_parameters(replace(self.teacher, levels=4)) if self.teacher else 0
        )
        # Whether all streams go through a step as one sequence.
        self.packs_streams = recipe.engine.micro_batches == "packed" and not self._alternates
        self.value_bytes = 2 if recipe.engine.dtype == "bfloat16" else 4
        self.by_hand = recipe.engine.compile is None and recipe.model.rope == "interleaved"
        self._drawn: dict[tuple[int, int], list[TokenNumbers]] = {}

    def tokens(self, stream: Stream) -> list[TokenNumbers]:
        """A clip's tokens in each of the first steps."""
        stream = replace(stream, clips=min(stream.clips, MOST_DRAWN))
        key = stream.number, stream.clips
        if key not in self._drawn:
            maker = replace(mask_maker(self.recipe, stream), weigh=False)
            self._drawn[key] = [
                TokenNumbers(stream.tokens, context, predicted, image=stream.frames == 1)
                for context, predicted in counts(maker, range(DRAWN_STEPS))
            ]
        return self._drawn[key]

    def part(self, stream: Stream) -> Part:
        """Tokens, operations and memory of one process's pass over a batch of `stream`."""
        drawn, model = self.tokens(stream), self.recipe.model
        context, predicted = (
            tuple(map(fmean, zip(*kept, strict=True)))
            for kept in ([t.context for t in drawn], [t.predicted for t in drawn])
        )
        share = stream.share if self._alternates else 1.0
        return Part(
            context,
            predicted,
            share * self.recipe.optim.accumulate,
            mean_flops(
                [
                    step_flops(
                        self.encoder, self.predictor, tokens, batch=stream.clips,
                        target=self.teacher, checkpointing=model.checkpointing,
                        keep_attention=model.keep_attention,
                    )
                    for tokens in drawn
                ]
            ),
            Footprint(
                state_bytes(
                    self.encoder_parameters, self.predictor_parameters,
                    layout="torch", value_bytes=self.value_bytes,
                    teacher=self.teacher_parameters, by_hand=self.by_hand,
                ),
                self.activations(stream, drawn, checkpointing=model.checkpointing),
            ),
        )  # fmt: skip

    def at_the_height(self, held: Sequence[Activations]) -> Activations:
        """Bytes that a step's micro-batches hold together, of which each needs `held`: the largest
        where they take turns, all that are in one step where they are packed."""
        packed = self.recipe.engine.micro_batches == "packed"
        together = held if self.packs_streams else [max(held, key=lambda one: one.total)]
        times = self.recipe.optim.accumulate if packed else 1
        parts = zip(*map(astuple, together), strict=True)
        return Activations(*(times * sum(values) for values in parts))

    def activations(
        self,
        stream: Stream,
        drawn: list[TokenNumbers],
        *,
        checkpointing: Checkpointing,
        layout: Layout = "torch",
    ) -> Activations:
        """Bytes of a batch of `stream` in the largest of the steps `drawn`.

        Only layout `torch` has float32 weights, and only its engine takes mask groups in turn.
        """
        alone, own = layout == "torch", self.recipe.engine
        return max(
            (
                step_activations(
                    self.encoder, self.predictor, tokens, batch=stream.clips,
                    value_bytes=self.value_bytes,
                    stream_bytes=4 if own.residual == "reference" else self.value_bytes,
                    checkpointing=checkpointing,
                    keep_attention=self.recipe.model.keep_attention,
                    scores=self.recipe.model.attention == "math",
                    in_turn=alone and own.mask_groups == "in_turn",
                    by_hand=self.by_hand,
                )
                for tokens in drawn
            ),
            key=lambda held: held.total,
        )  # fmt: skip
