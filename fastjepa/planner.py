"""A recipe on many GPUs: bytes per rank, communication, largest batches, step time, GPU-hours.

    plan = make_plan(recipe, resolve(recipe), Cluster(gpus=64, gpu=gpu_named("h100")))
    plan.layouts["zero2"].states.total, plan.layouts["zero2"].largest["video"]

Nothing is built. Every rank takes the recipe's batch, so the samples of an update grow with the
ranks. docs/planning.md has each formula.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from fastjepa.config.resolve import Resolved
from fastjepa.config.schema import Recipe
from fastjepa.config.streams import Stream
from fastjepa.estimate import Estimate, Part, StreamCosts, estimate
from fastjepa.observe.flops import Checkpointing, TokenNumbers
from fastjepa.observe.footprint import Activations
from fastjepa.observe.states import LAYOUTS, Layout, StateBytes
from fastjepa.planning.balance import Roles
from fastjepa.planning.communication import Traffic, ring_bandwidth, step_traffic
from fastjepa.planning.gpus import Gpu
from fastjepa.rank_memory import chosen_layout, held_between_passes, largest_activations
from fastjepa.roles import even_roles, given_roles, share_of

# Masks are drawn for batches of at most this size; larger ones keep hardly fewer tokens.
_LARGEST_DRAWN = 64
# Bytes that AdamW and the EMA read and write for a parameter, whatever the layout: gradient,
# weight and moments in and out and a bf16 copy; weight in, EMA in and out, and a bf16 copy.
_ADAMW_BYTES, _EMA_BYTES = 30, 14


@dataclass(frozen=True)
class Cluster:
    """GPUs, their links (bytes a second, each way), and what is assumed of them.

    `mfu` is the share of the peak rate at which a step's operations run, the recompute of
    checkpointing not counted. `reserve` is the share of the memory left for workspace and gaps.
    """

    gpus: int
    gpu: Gpu
    gpus_per_node: int = 8
    nvlink: float | None = None
    network: float | None = None
    mfu: float = 0.5
    reserve: float = 0.1

    def __post_init__(self) -> None:
        for option, value, fits in (
            ("--gpus", self.gpus, self.gpus >= 1),
            ("--gpus-per-node", self.gpus_per_node, self.gpus_per_node >= 1),
            ("--nvlink", self.nvlink, self.nvlink is None or self.nvlink > 0),
            ("--network", self.network, self.network is None or self.network > 0),
            ("--mfu", self.mfu, 0 < self.mfu <= 1),
            ("--reserve", self.reserve, 0 <= self.reserve < 1),
        ):
            if not fits:
                raise ValueError(f"{option}: {value} does not fit; see fastjepa plan --help")

    @property
    def usable(self) -> float:
        """Bytes of a GPU that a run may fill."""
        return self.gpu.memory * (1.0 - self.reserve)

    @property
    def link(self) -> float:
        """Bytes a second of the slowest link of a ring over all GPUs."""
        return ring_bandwidth(
            self.gpus,
            ranks_per_node=self.gpus_per_node,
            nvlink=self.nvlink or self.gpu.nvlink,
            network=self.network or self.gpu.network,
        )


@dataclass(frozen=True)
class Timing:
    """Seconds of a step: its products, its update, its communication, and their sum where all of
    the communication waits for the products (`exposed`) or runs beside them (`hidden`)."""

    compute: float
    update: float
    communication: float

    @property
    def exposed(self) -> float:
        return self.compute + self.communication + self.update

    @property
    def hidden(self) -> float:
        return max(self.compute, self.communication) + self.update


@dataclass(frozen=True)
class LayoutPlan:
    """One layout of the states on this many ranks; pairs are without and with checkpointing, of
    the recipe's kind or else of all blocks.

    `gathered` are the bytes of communication buckets and of stage 3's gathered block;
    `activations` those of the largest stream at its batch; `largest` is the largest batch of each
    stream that fits. `timing` is None where the layout cannot run on so many ranks.
    """

    states: StateBytes
    gathered: int
    activations: tuple[Activations, Activations]
    largest: dict[str, tuple[int, int]]
    traffic: Traffic
    timing: Timing | None

    def total(self, *, checkpointing: bool) -> int:
        """Bytes a rank holds at the height of a step."""
        return self.states.total + self.gathered + self.activations[checkpointing].total


@dataclass(frozen=True)
class Plan:
    """What `fastjepa plan` prints.

    `chosen` is the layout of the recipe's engine. `flops` are the busiest rank's operations in a
    step, `recompute` those among them that checkpointing repeats; `samples` are an update's over
    all ranks. `roles` are the reference's split into image and video ranks and the balanced one,
    where the recipe has them; `flops`, memory and time are those of the one that it asks for.
    """

    cluster: Cluster
    numbers: Estimate
    flops: float
    recompute: float
    samples: float
    steps: int
    checkpointing: Checkpointing
    chosen: Layout
    layouts: dict[Layout, LayoutPlan]
    roles: tuple[Roles, ...] | None

    @property
    def hardware_share(self) -> float:
        """Share of the peak at which the GPU has to run, the recompute counted."""
        return self.cluster.mfu * self.flops / (self.flops - self.recompute)

    def days(self, step: float) -> float:
        """Days of the whole recipe at `step` seconds a step."""
        return self.steps * step / 86_400

    def gpu_hours(self, step: float) -> float:
        """Hours of all GPUs together for the whole recipe."""
        return 24 * self.days(step) * self.cluster.gpus


def make_plan(recipe: Recipe, resolved: Resolved, cluster: Cluster) -> Plan:
    """The plan of `recipe` on `cluster`.

    Raises ValueError for a utilisation that the recompute makes impossible, and for roles that a
    recipe or so many ranks cannot have.
    """
    numbers = estimate(recipe, resolved)
    costs = StreamCosts(recipe, resolved)
    roles: tuple[Roles, ...] | None = None
    streams = dict(resolved.streams)
    works = [[(part, part.passes) for part in numbers.parts.values()]]
    samples = resolved.clips_per_step * cluster.gpus
    rank_ratio = recipe.ranks.rank_ratio
    if rank_ratio is not None and cluster.gpus > 1:
        if recipe.ranks.balance == "work" or streams.keys() == {"video", "image"}:
            roles = _splits(recipe, costs, streams, cluster.gpus, rank_ratio)
        ends = [
            share_of(
                recipe, resolved, rank=rank, ranks=cluster.gpus, even=roles[-1] if roles else None
            )
            for rank in (cluster.gpus - 1, 0)
        ]
        streams = {name: stream for end in ends for name, stream in end.streams.items()}
        parts = [list(map(costs.part, end.streams.values())) for end in ends]
        works = [[(part, part.passes) for part in own] for own in parts]
        samples = sum(ends[0].samples_per_step.values())
    flops, recompute = max(_operations(work) for work in works)
    plan = Plan(
        cluster, numbers, flops, recompute, samples, resolved.steps, recipe.model.checkpointing,
        chosen_layout(recipe),
        {
            layout: _layout(
                costs, cluster, layout, streams, flops - recompute,
                passes=sum(passes for _, passes in works[0]),
            )
            for layout in LAYOUTS
        },
        roles,
    )  # fmt: skip
    if plan.hardware_share > 1.0:
        raise ValueError(
            f"--mfu: {cluster.mfu:g} without the recompute of checkpointing is "
            f"{plan.hardware_share:.2f} of the peak with it; expected at most "
            f"{cluster.mfu / plan.hardware_share:.2f}"
        )
    return plan


def _splits(
    recipe: Recipe, costs: StreamCosts, streams: dict[str, Stream], ranks: int, ratio: float
) -> tuple[Roles, ...]:
    """The reference's split, and the even one where there is one (if asked for, there must be)."""
    given = given_roles(costs, streams, ranks, ratio)
    try:
        return given, even_roles(costs, streams, ranks, ratio)
    except ValueError:
        if recipe.ranks.balance == "work":
            raise
        return (given,)


def _operations(work: Sequence[tuple[Part, float]]) -> tuple[float, float]:
    """Operations of a rank's step, and those among them that are recomputed."""
    parts = [(part.flops, passes) for part, passes in work]
    return (
        sum(passes * flops.total for flops, passes in parts),
        sum(passes * flops.recompute for flops, passes in parts),
    )


def _layout(
    costs: StreamCosts,
    cluster: Cluster,
    layout: Layout,
    streams: dict[str, Stream],
    model_flops: float,
    *,
    passes: float,
) -> LayoutPlan:
    engine = costs.recipe.engine
    ranks, sizes = cluster.gpus, (costs.encoder_parameters, costs.predictor_parameters)
    trained = sum(sizes)
    states, gathered = held_between_passes(costs, layout, ranks)
    room = int(cluster.usable) - states.total - gathered
    again = costs.recipe.model.checkpointing or True
    plain, checkpointed = (
        largest_activations(costs, streams.values(), layout, checkpointing=checkpointing)
        for checkpointing in (False, again)
    )
    traffic = step_traffic(
        *sizes, layout=layout, ranks=ranks, passes=passes, value_bytes=costs.value_bytes,
        gradient_bytes={"float32": 4, "bfloat16": 2, None: costs.value_bytes}[
            engine.communication_dtype
        ],
    )  # fmt: skip
    shards = 1 if layout in ("torch", "zero0") else ranks
    update = (_ADAMW_BYTES * trained + _EMA_BYTES * sizes[0]) / shards
    timing = Timing(
        compute=model_flops / (cluster.mfu * cluster.gpu.bf16_flops),
        update=0.0 if states.host else update / cluster.gpu.memory_bandwidth,
        communication=traffic.total / cluster.link,
    )
    return LayoutPlan(
        states,
        gathered,
        (plain, checkpointed),
        {
            name: (
                _largest(costs, streams, name, layout, room, checkpointing=False),
                _largest(costs, streams, name, layout, room, checkpointing=again),
            )
            for name in streams
        },
        traffic,
        None if layout == "torch" and ranks > 1 else timing,
    )


def _largest(
    costs: StreamCosts,
    streams: dict[str, Stream],
    name: str,
    layout: Layout,
    room: int,
    *,
    checkpointing: Checkpointing,
) -> int:
    """The largest batch of a stream whose activations fit `room` bytes; 0 if none does.

    Streams that are packed beside it have their own batches. A clip keeps fewer tokens in a larger
    batch. So masks are drawn for batches of powers of two, and a batch is held to need what its
    clips need in the next smaller one drawn.
    """
    needs = partial(costs.activations, checkpointing=checkpointing, layout=layout)
    stream = streams[name]
    beside = [
        needs(other, costs.tokens(other))
        for other in streams.values()
        if costs.packs_streams and other is not stream
    ]
    drawn, most = _LARGEST_DRAWN, 0
    while drawn:
        tokens = costs.tokens(replace(stream, clips=drawn))

        def needed(clips: int, tokens: list[TokenNumbers] = tokens) -> int:
            own = needs(replace(stream, clips=clips), tokens)
            return costs.at_the_height([own, *beside]).total

        whole = needed(1)
        each = needed(2) - whole
        most = 1 + (room - whole) // each
        if most >= drawn:
            return most
        drawn //= 2
    return 0
