"""Bytes that a rank holds at the height of a step of a recipe: states, buckets, activations.

bytes_of_rank(recipe, resolve(recipe), ranks=8)
"""

from collections.abc import Iterable

from fastjepa.config.resolve import Resolved
from fastjepa.config.schema import Recipe
from fastjepa.config.streams import Stream
from fastjepa.estimate import StreamCosts
from fastjepa.observe.flops import Checkpointing, block_parameters
from fastjepa.observe.footprint import Activations
from fastjepa.observe.states import LAYOUTS, Layout, StateBytes, state_bytes
from fastjepa.roles import share_of
from fastjepa.train.engine_deepspeed import BUCKET

# The engine's: stages that reduce one bucket while the next one fills, and the blocks that stage 3
# has whole at one time.
_OVERLAPPED, _LIVE_BLOCKS = ("zero2", "zero3"), 3


def chosen_layout(recipe: Recipe) -> Layout:
    """The layout that the recipe's engine has."""
    if recipe.engine.kind == "torch":
        return "torch"
    return LAYOUTS[1 + recipe.engine.zero_stage]


def bytes_of_rank(recipe: Recipe, resolved: Resolved, *, ranks: int) -> int:
    """What a rank holds on its device, the one that holds most where ranks differ.

    Raises ValueError for roles that so many ranks cannot have.
    """
    costs, layout = StreamCosts(recipe, resolved), chosen_layout(recipe)
    states, gathered = held_between_passes(costs, layout, ranks)
    ends = [share_of(recipe, resolved, rank=rank, ranks=ranks) for rank in {0, ranks - 1}]
    checkpointing = recipe.model.checkpointing
    held = max(
        largest_activations(
            costs, share.streams.values(), layout, checkpointing=checkpointing
        ).total
        for share in ends
    )
    return states.total + gathered + held


def held_between_passes(costs: StreamCosts, layout: Layout, ranks: int) -> tuple[StateBytes, int]:
    """A rank's states, and its communication buckets with stage 3's gathered blocks."""
    sizes = costs.encoder_parameters, costs.predictor_parameters
    states = state_bytes(
        *sizes, layout=layout, ranks=ranks, value_bytes=costs.value_bytes,
        offload=costs.recipe.engine.offload, teacher=costs.teacher_parameters,
        by_hand=costs.by_hand,
    )  # fmt: skip
    gathered = 0
    if layout != "torch" and ranks > 1:
        buckets = 2 if layout in _OVERLAPPED else 1
        gathered = buckets * costs.value_bytes * min(BUCKET, sum(sizes))
    if layout == "zero3":
        block = block_parameters(costs.encoder.width, costs.encoder.mlp_width)
        gathered += _LIVE_BLOCKS * costs.value_bytes * block
    return states, gathered


def largest_activations(
    costs: StreamCosts, streams: Iterable[Stream], layout: Layout, *, checkpointing: Checkpointing
) -> Activations:
    """Those of the stream that needs most where they take turns, of all where they are packed."""
    return costs.at_the_height(
        [
            costs.activations(
                stream, costs.tokens(stream), checkpointing=checkpointing, layout=layout
            )
            for stream in streams
        ]
    )
