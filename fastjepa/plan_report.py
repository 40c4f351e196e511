"""A plan in words: tables for a terminal, lines for a pipe, numbers for scripts.

print(as_text(tables(plan)))
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from fastjepa.observe.quantities import binary_size, count, scaled, seconds
from fastjepa.observe.states import StateBytes
from fastjepa.observe.tables import aligned
from fastjepa.planner import Plan, Timing
from fastjepa.planning.balance import Roles

_CALLED = {"torch": "torch", **{f"zero{stage}": f"ZeRO {stage}" for stage in range(4)}}


@dataclass(frozen=True)
class Grid:
    """A heading, the names of the columns, and rows whose first cell names them."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(plan: Plan) -> list[Grid]:
    """Everything the plan says, in reading order."""
    layouts = tuple(
        _CALLED[name] + (" (recipe)" if name == plan.chosen else "") for name in plan.layouts
    )
    grids = [
        Grid("Assumed", ("", ""), tuple(_assumed(plan))),
        Grid("Step", ("", ""), tuple(_step(plan))),
        Grid("Operations of a step", _FLOPS, tuple(_operations(plan))),
        Grid("Bytes of a rank", ("", *layouts), tuple(_memory(plan))),
        Grid("Largest batch that fits", ("", *layouts), tuple(_largest(plan))),
        Grid("Sent by a rank in a step", ("", *layouts), tuple(_traffic(plan))),
        Grid("Time, with communication hidden to waited for", ("", *layouts), tuple(_time(plan))),
    ]
    if plan.roles:
        grids.append(Grid("Image and video ranks", _ROLES, tuple(_roles(plan.roles))))
    return grids


def as_table(grids: Sequence[Grid]) -> RenderableType:
    """For a terminal."""
    shown: list[RenderableType] = []
    for grid in grids:
        table = Table(
            title=grid.title, title_justify="left", box=None, show_header=any(grid.columns)
        )
        for number, column in enumerate(grid.columns):
            table.add_column(
                escape(column), style=None if number else "cyan", no_wrap=not number,
                overflow="fold",
            )  # fmt: skip
        for row in grid.rows:
            table.add_row(*map(escape, row))
        shown += [table, ""]
    return Group(*shown)


def as_text(grids: Sequence[Grid]) -> str:
    """For a pipe or a file: one line a row, never wrapped."""
    lines: list[str] = []
    for grid in grids:
        header = [grid.columns] if any(grid.columns) else []
        lines += [grid.title, *(f"  {line}" for line in aligned([*header, *grid.rows])), ""]
    return "\n".join(lines).rstrip("\n")


def as_json(plan: Plan) -> str:
    """The plan as plain numbers: bytes, operations, seconds, bytes a second."""
    tree = asdict(plan)
    tree["hardware_share"] = plan.hardware_share
    for name, layout in plan.layouts.items():
        tree["layouts"][name]["bytes"] = {
            "plain": layout.total(checkpointing=False),
            "checkpointed": layout.total(checkpointing=True),
        }
        if layout.timing:
            for kind in ("hidden", "exposed"):
                step = getattr(layout.timing, kind)
                tree["layouts"][name]["timing"][kind] = {
                    "step": step,
                    "samples_per_second": plan.samples / step,
                    "gpu_hours": plan.gpu_hours(step),
                }
    return json.dumps(tree, indent=1)


Rows = Iterator[tuple[str, ...]]
_FLOPS = ("", "target", "context", "predictor", "loss", "together", "passes")
_ROLES = (
    "", "ranks", "batch of a rank", "samples an update", "weight", "loss factor", "work of a rank",
    "spread",
)  # fmt: skip


def _assumed(plan: Plan) -> Rows:
    cluster, gpu = plan.cluster, plan.cluster.gpu
    yield "GPUs", f"{cluster.gpus} x {gpu.name}, {cluster.gpus_per_node} a node ({gpu.source})"
    yield "peak", f"{scaled(gpu.bf16_flops, 'FLOP/s')} in bf16, dense; {cluster.mfu:.0%} reached"
    yield (
        "memory",
        f"{binary_size(gpu.memory)}, of which {binary_size(cluster.usable)} may be filled; "
        f"{scaled(gpu.memory_bandwidth, 'B/s')}",
    )
    yield "slowest link", f"{scaled(cluster.link, 'B/s')} each way" if cluster.gpus > 1 else "none"
    if plan.checkpointing:
        yield "with recompute", f"{plan.hardware_share:.0%} of the peak"


def _step(plan: Plan) -> Rows:
    numbers = plan.numbers
    yield "parameters of the encoder", count(numbers.encoder_parameters)
    yield "parameters of the predictor", count(numbers.predictor_parameters)
    yield "samples an update", f"{plan.samples:,.6g} over all ranks"
    yield (
        "operations of a rank",
        f"{scaled(plan.flops, 'FLOP')}, of which {scaled(plan.recompute, 'FLOP')} recomputed",
    )
    yield "steps", f"{plan.steps:,}"


def _operations(plan: Plan) -> Rows:
    for name, part in plan.numbers.parts.items():
        flops = part.flops
        for kind in ("forward", "backward", "recompute"):
            cells = [
                part.passes * getattr(getattr(flops, network), kind)
                for network in ("target", "context", "predictor", "loss")
            ]
            passes = f"{part.passes:g}" if kind == "forward" else ""
            yield (
                f"{name}: {kind}",
                *(scaled(cell, "FLOP") for cell in cells),
                scaled(sum(cells), "FLOP"),
                passes,
            )


_KINDS = {
    "weights": "weights",
    "casts": "autocast's bf16 copies",
    "gradients": "gradients",
    "master": "float32 master weights",
    "moments": "AdamW moments",
    "ema": "float32 EMA",
    "target": "working copy of the target",
    "teacher": "frozen teacher",
    "host": "(offloaded to the host)",
}


def _memory(plan: Plan) -> Rows:
    layouts = list(plan.layouts.values())
    for field in fields(StateBytes):
        sizes = [getattr(layout.states, field.name) for layout in layouts]
        if field.name in ("casts", "teacher", "host") and not any(sizes):
            continue
        yield _KINDS[field.name], *(binary_size(size) if size else "-" for size in sizes)
    yield "buckets, gathered blocks", *(_or_none(layout.gathered) for layout in layouts)
    for number, words in enumerate(_blocks(plan)):
        yield (
            f"activations, {words}",
            *(binary_size(layout.activations[number].total) for layout in layouts),
        )
    for number, words in enumerate(_blocks(plan)):
        totals = [layout.total(checkpointing=bool(number)) for layout in layouts]
        yield (
            f"together, {words}",
            *(
                binary_size(total) + ("" if total <= plan.cluster.usable else " (too much)")
                for total in totals
            ),
        )


def _blocks(plan: Plan) -> tuple[str, str]:
    """Words for the two of a pair."""
    again = "encoder checkpointed" if plan.checkpointing == "encoder" else "checkpointed"
    return "plain blocks", again


def _or_none(size: float) -> str:
    return binary_size(size) if size else "-"


def _largest(plan: Plan) -> Rows:
    layouts = list(plan.layouts.values())
    for name in layouts[0].largest:
        for number, words in enumerate(_blocks(plan)):
            yield f"{name}, {words}", *(f"{one.largest[name][number]:,}" for one in layouts)


def _traffic(plan: Plan) -> Rows:
    layouts = list(plan.layouts.values())
    for kind in ("gradients", "weights", "target", "total"):
        yield (
            "together" if kind == "total" else kind,
            *(_or_none(getattr(layout.traffic, kind)) for layout in layouts),
        )


def _time(plan: Plan) -> Rows:
    timings = [layout.timing for layout in plan.layouts.values()]

    def row(name: str, cell: Callable[[Timing], str]) -> tuple[str, ...]:
        return name, *("one process" if one is None else cell(one) for one in timings)

    def span(words: Callable[[float], str]) -> Callable[[Timing], str]:
        return lambda one: " to ".join(dict.fromkeys((words(one.hidden), words(one.exposed))))

    yield row("products", lambda one: seconds(one.compute))
    yield row("AdamW and EMA", lambda one: seconds(one.update) if one.update else "on the host")
    yield row("communication", lambda one: seconds(one.communication))
    yield row("step", span(seconds))
    yield row("samples a second", span(lambda step: f"{plan.samples / step:,.0f}"))
    yield row("days", span(lambda step: f"{plan.days(step):,.3g}"))
    yield row("GPU-hours", span(lambda step: f"{plan.gpu_hours(step):,.4g}"))


def _roles(splits: tuple[Roles, ...]) -> Rows:
    for words, roles in zip(("by ratio", "by work"), splits, strict=False):
        for name, role, work in (
            ("image", roles.image, roles.work[0]),
            ("video", roles.video, roles.work[1]),
        ):
            yield (
                f"{words}: {name}",
                f"{role.ranks:,}",
                f"{role.batch:,}",
                f"{role.samples:,}",
                f"{role.share:.4g}",
                f"{role.factor:.4g}",
                scaled(work, "FLOP"),
                f"{roles.spread:.1%}",
            )
