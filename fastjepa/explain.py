"""What a recipe comes to, in numbers a person can judge before the first step.

    sections = explain(recipe, resolve(recipe))
    print(as_text(sections))

Nothing is built, and no data is opened. estimate.py works out the costs; here they get words.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from fastjepa.config.resolve import Resolved
from fastjepa.config.schema import MaskGroup, Recipe, Source
from fastjepa.config.streams import Stream
from fastjepa.estimate import DRAWN_STEPS, Estimate, Part, estimate
from fastjepa.observe.quantities import binary_size, count, scaled
from fastjepa.optim.schedules import ema_momentum, learning_rate, weight_decay


@dataclass(frozen=True)
class Section:
    """A heading and its rows of (name, value with unit)."""

    title: str
    rows: tuple[tuple[str, str], ...]


def explain(recipe: Recipe, resolved: Resolved) -> list[Section]:
    """Every number that follows from `recipe`, by section, as text with units.

    Raises ValueError where the masks leave no context or no predictions.
    """
    numbers = estimate(recipe, resolved)
    sections = [("Model", _model(recipe, resolved, numbers))]
    for name, stream in resolved.streams.items():
        groups: tuple[MaskGroup, ...] = getattr(recipe.masks, stream.modality)
        rows = _stream(stream, groups, numbers.parts[name])
        sections.append((_called(name).capitalize(), rows))
    sections += [
        ("Objective", _objective(recipe, resolved)),
        ("Schedule", _schedule(recipe, resolved)),
        ("Optimizer step", _optimizer_step(recipe, resolved)),
        ("Compute of an optimizer step", _compute(numbers, resolved.steps)),
        ("Memory (estimate)", _memory(recipe, numbers)),
        ("Data", _data(recipe, resolved)),
    ]
    if resolved.notes:
        sections.append(("Notes", (("note", note) for note in resolved.notes)))
    return [Section(title, tuple(rows)) for title, rows in sections]


def as_table(sections: Sequence[Section]) -> RenderableType:
    """For a terminal: a titled table for each section, names aligned over all of them."""
    width = max((len(name) for section in sections for name, _ in section.rows), default=0)
    tables = []
    for section in sections:
        table = Table(title=section.title, title_justify="left", show_header=False, box=None)
        table.add_column(style="cyan", min_width=width, no_wrap=True)
        table.add_column(overflow="fold")
        for row in section.rows:
            table.add_row(*map(escape, row))
        tables.append(table)
    return Group(*tables)


def as_text(sections: Sequence[Section]) -> str:
    """For a pipe or a file: one line a row, never wrapped."""
    width = max((len(name) for section in sections for name, _ in section.rows), default=0)
    lines = []
    for section in sections:
        lines += [section.title, *(f"  {name:<{width}}  {text}" for name, text in section.rows), ""]
    return "\n".join(lines).rstrip("\n")


def as_json(recipe: Recipe, resolved: Resolved) -> str:
    """For scripts: the resolved recipe and its estimate as plain numbers (bytes, operations)."""
    tree = {
        "recipe": recipe.model_dump(mode="json"),
        "resolved": asdict(resolved),
        "estimate": asdict(estimate(recipe, resolved)),
    }
    return json.dumps(tree, indent=1)


Rows = Iterable[tuple[str, str]]


def _model(recipe: Recipe, resolved: Resolved, numbers: Estimate) -> Rows:
    encoder, predictor = resolved.encoder, resolved.predictor
    yield (
        "encoder",
        f"{recipe.model.name}: width {encoder.width}, {encoder.depth} blocks, "
        f"{encoder.heads} heads of {encoder.width // encoder.heads}, MLP {encoder.mlp_width}",
    )
    yield (
        "predictor",
        f"width {predictor.width}, {predictor.depth} blocks, "
        f"{predictor.heads} heads of {predictor.width // predictor.heads}, "
        f"MLP {predictor.mlp_width}",
    )
    yield (
        "supervised levels",
        ", ".join(
            f"block {level} (weight {weight:.4g})"
            for level, weight in zip(encoder.levels, resolved.level_weights, strict=True)
        )
        + f" of 0 to {encoder.depth - 1}",
    )
    yield "parameters of the encoder", count(numbers.encoder_parameters)
    yield "parameters of the predictor", count(numbers.predictor_parameters)
    yield "parameters of the target", f"{count(numbers.encoder_parameters)}, not trained"
    if recipe.distill is not None and resolved.teacher is not None:
        teacher = resolved.teacher
        yield (
            "teacher",
            f"{recipe.distill.name}: width {teacher.width}, {teacher.depth} blocks, level "
            f"{teacher.levels[-1]}; {count(numbers.teacher_parameters)} parameters, frozen, from "
            f"{recipe.distill.teacher}",
        )


def _called(stream: str) -> str:
    return "images" if stream == "image" else stream


def _stream(stream: Stream, groups: Sequence[MaskGroup], part: Part) -> Rows:
    time, height, width = stream.grid
    pixels = f"{stream.crop} x {stream.crop} px"
    if stream.frames > 1:
        fps = stream.fps
        yield (
            "clip",
            f"{stream.frames} frames at {fps:g} fps ({stream.frames / fps:.3g} s), {pixels}",
        )
    else:
        yield "image", pixels
    yield "token grid", f"{time} x {height} x {width} (time, height, width)"
    yield "tokens a clip", f"{stream.tokens:,}"
    for number, group in enumerate(groups):
        context, predicted = part.context[number], part.predicted[number]
        yield (
            f"mask group {number}",
            f"{group.num_blocks} {'block' if group.num_blocks == 1 else 'blocks'} of "
            f"{_range(group.spatial_scale)} of the area: "
            f"context {context:,.0f} ({context / stream.tokens:.0%}), "
            f"predicted {predicted:,.0f} ({predicted / stream.tokens:.0%}), "
            f"means of {DRAWN_STEPS} steps",
        )
    yield "batch per rank", f"{stream.clips:,}"
    yield "share of an update", f"{stream.share:.4g}"
    yield "context weight (lambda)", f"{stream.context_weight:g}"


def _objective(recipe: Recipe, resolved: Resolved) -> Rows:
    objective = recipe.objective
    added = [name for name in ("dense", "deep") if getattr(objective, name)]
    yield "method", " + ".join(("V-JEPA 2", *added)) + (" (V-JEPA 2.1)" if len(added) == 2 else "")
    yield "difference", f"|z - y|^p / p with p = {objective.loss_exp:g}"
    if objective.dense:
        weighed = "1 / sqrt(distance to the nearest predicted token)"
        yield "context tokens weigh", weighed if objective.distance_weights else "1"
        if resolved.ramp is None:
            yield "context ramp", "none: full weight from step 0"
        else:
            start, end = resolved.ramp
            yield "context ramp", f"0 up to step {start:,}, full from step {end:,}"


def _schedule(recipe: Recipe, resolved: Resolved) -> Rows:
    optim, steps, horizon = recipe.optim, resolved.steps, resolved.horizon
    last = steps - 1
    yield "steps", f"{steps:,}"
    yield (
        "warm-up",
        f"{resolved.warmup:,} steps, learning rate from {optim.start_lr:g} to {optim.lr:g}"
        if resolved.warmup
        else "none",
    )
    end_lr = learning_rate(
        last, shape=optim.schedule, start=optim.start_lr, peak=optim.lr, final=optim.final_lr,
        warmup=resolved.warmup, horizon=horizon,
    )  # fmt: skip
    then = (
        "constant"
        if optim.schedule == "constant"
        else f"{optim.schedule} to {optim.final_lr:g} at step {horizon:,}"
    )
    yield "learning rate", f"{optim.lr:g}, {then}; {end_lr:.4g} at the last step"
    end_decay = weight_decay(
        last, start=optim.weight_decay, final=optim.final_weight_decay, horizon=horizon
    )
    yield "weight decay", _course(optim.weight_decay, optim.final_weight_decay, end_decay)
    end_momentum = ema_momentum(
        last, start=resolved.momentum, final=optim.ema.final_momentum, horizon=horizon
    )
    yield "EMA momentum", _course(resolved.momentum, optim.ema.final_momentum, end_momentum)
    yield "EMA half-life", _half_life(resolved.momentum)
    guard = recipe.guard
    yield (
        "guard",
        "skips steps that are not finite"
        + (
            ""
            if guard.sigma is None
            else f"; from step {resolved.guard_start:,} also a loss above mean + {guard.sigma:g} "
            f"std of the last {guard.window}"
        )
        + f"; the run stops at more than {guard.max_skips} in a row"
        + (
            ""
            if guard.return_after is None
            else f", and before that goes back to the last good checkpoint at {guard.return_after},"
            f" at most {guard.max_returns} times"
        ),
    )
    yield (
        "checkpoints",
        f"every {recipe.train.checkpoint_every:,} steps and at the end, "
        f"the last {recipe.train.keep_checkpoints} kept",
    )


def _optimizer_step(recipe: Recipe, resolved: Resolved) -> Rows:
    names = list(resolved.streams)
    mixed = len(names) > 1
    ratio = recipe.ranks.rank_ratio
    if ratio is not None:
        even = ", with batches of equal work" if recipe.ranks.balance == "work" else ""
        yield "ranks", f"of R, the first int({ratio:g} R) on images, the others on videos{even}"
        yield "on one rank", f"images every {1.0 / ratio:.4g} steps"
    elif mixed and resolved.mix == "alternate":
        first, *others = names
        shares = ", ".join(f"{resolved.streams[n].share:.3g} on {_called(n)}" for n in others)
        yield "mix", f"alternate: of the steps {shares}, the rest on {_called(first)}"
    elif mixed:
        yield "mix", f"accumulate: a batch each of {', '.join(map(_called, names))} in each step"
    if recipe.optim.accumulate > 1:
        yield "accumulate", f"{recipe.optim.accumulate} micro-batches of each"
    if recipe.engine.micro_batches == "packed":
        yield "micro-batches", "all of a step packed into one sequence"
    kinds = [("clips", resolved.video), ("images", resolved.image)]
    unit = " and ".join(kind for kind, stream in kinds if stream)
    mean = " on average" if mixed and resolved.mix == "alternate" else ""
    mean = f"{mean}, on one rank" if ratio is not None else mean
    yield f"{unit} a step", f"{resolved.clips_per_step:,.6g}{mean}"
    yield f"{unit} in all", f"{resolved.clips_per_step * resolved.steps:,.0f}"


def _compute(numbers: Estimate, steps: int) -> Rows:
    for stream, part in numbers.parts.items():
        name = _called(stream)
        for kind in ("target", "context", "predictor", "loss"):
            yield (
                f"{name}: {kind}",
                scaled(part.passes * getattr(part.flops, kind).total, "FLOP"),
            )
        yield f"{name}: together", scaled(part.passes * part.flops.total, "FLOP")
    yield "a step", scaled(numbers.flops, "FLOP")
    yield "the run", scaled(numbers.flops * steps, "FLOP")


def _memory(recipe: Recipe, numbers: Estimate) -> Rows:
    states, held = numbers.memory.states, numbers.memory.activations
    yield "weights", f"{binary_size(states.weights)} (float32)"
    if states.casts:
        yield "their bf16 copies", f"{binary_size(states.casts)} (by autocast)"
    yield "gradients", f"{binary_size(states.gradients)} (float32)"
    yield "AdamW moments", f"{binary_size(states.moments)} (float32)"
    yield "target encoder", f"{binary_size(states.ema)} (float32)"
    if states.teacher:
        yield "teacher", f"{binary_size(states.teacher)} (float32)"
    kept = {
        False: "plain blocks",
        True: "block inputs only",
        "encoder": "block inputs only of the encoder",
    }[recipe.model.checkpointing]
    yield (
        "activations",
        f"about {binary_size(held.total)} ({recipe.engine.dtype}, estimated for {kept} on a GPU: "
        f"context {binary_size(held.context)}, "
        f"predictor {binary_size(held.predictor)}, "
        f"loss {binary_size(held.loss)})",
    )
    yield "together", f"about {binary_size(numbers.memory.total)}, workspace not counted"


def _data(recipe: Recipe, resolved: Resolved) -> Rows:
    read = (
        ("video", recipe.data.video, resolved.video),
        ("images", recipe.data.image, resolved.image),
    )
    for name, sources, stream in read:
        if stream:
            yield from _sources(name, sources)
    workers = recipe.data.workers
    yield (
        "workers",
        f"{workers} for each of {', '.join(map(_called, resolved.streams))}"
        if workers
        else "none: read in the trainer",
    )


def _sources(name: str, sources: Sequence[Source]) -> Iterator[tuple[str, str]]:
    total = math.fsum(source.weight for source in sources)
    for source in sources:
        yield name, f"{source.path} ({source.weight / total:.1%} of the draws)"


def _course(start: float, final: float | None, at_last: float) -> str:
    if final is None or final == start:
        return f"{start:.6g}, constant"
    return f"{start:.6g} toward {final:.6g}; {at_last:.6g} at the last step"


def _half_life(momentum: float) -> str:
    if momentum >= 1.0:
        return "endless: the target never moves"
    if momentum <= 0.0:
        return "0 steps: the target is the encoder"
    return f"{math.log(0.5) / math.log(momentum):,.4g} steps"


def _range(scale: tuple[float, float]) -> str:
    low, high = scale
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
