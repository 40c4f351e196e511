"""Every number that follows from a recipe, worked out once; what cannot work is refused here.

resolved = resolve(load_recipe("configs/demo.yaml"))
resolved.video.grid, resolved.encoder.levels, resolved.warmup
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from fastjepa.config.errors import RecipeError
from fastjepa.config.schema import Duration, Model, Objective, Optim, Recipe, Sizes
from fastjepa.config.streams import Stream, streams_of
from fastjepa.presets import PRESETS, EncoderSize, default_levels

SMALLEST_HEAD = (
    6  # three axes of at least one rotated pair of channels each (docs/method.md section 2)
)


@dataclass(frozen=True)
class PredictorSize:
    """Shape of the predictor."""

    width: int
    depth: int
    heads: int
    mlp_width: int


@dataclass(frozen=True)
class Resolved:
    """What a recipe comes to. Steps are optimizer steps.

    `streams` are the kinds of clips by name, in the order in which a step takes them: `video`,
    those of `data.lengths`, `image`; without those that have no data or no share.
    `encoder.levels` are the supervised blocks (0-based) and `level_weights` their weights, sum 1;
    `norm_levels` are all blocks with a norm of their own, supervised or not. `teacher` is the
    frozen encoder that gives the targets of a distillation, None where the target encoder does.
    `mix` is how a rank that takes every stream mixes them; `clips_per_step` counts its clips and
    images, on average where steps alternate. `ramp` is (start, end) or None for a constant context
    weight. `notes` are sentences on keys without effect.
    """

    encoder: EncoderSize
    norm_levels: tuple[int, ...]
    predictor: PredictorSize
    teacher: EncoderSize | None
    level_weights: tuple[float, ...]
    streams: dict[str, Stream]
    mix: Literal["alternate", "accumulate"]
    clips_per_step: float
    steps: int
    warmup: int
    horizon: int
    ramp: tuple[int, int] | None
    guard_start: int
    momentum: float
    final_momentum: float
    notes: tuple[str, ...]

    @property
    def video(self) -> Stream | None:
        """Clips of `data.frames`, if videos are read."""
        return self.streams.get("video")

    @property
    def image(self) -> Stream | None:
        """Images, if they are read."""
        return self.streams.get("image")

    @property
    def image_share(self) -> float:
        """The images' weight in an update."""
        return 0.0 if self.image is None else self.image.share


def resolve(recipe: Recipe) -> Resolved:
    """All derived numbers of `recipe`.

    Raises RecipeError naming key, value and what fits where its values do not go together.
    """
    data, steps = recipe.data, recipe.train.steps
    if recipe.distill is not None and recipe.engine.target_dtype is not None:
        raise RecipeError(
            f"engine.target_dtype: {recipe.engine.target_dtype} is for the moving average, and a "
            "teacher gives the targets; expected null"
        )
    encoder = _encoder(recipe.model)
    norm_levels = encoder.levels
    if not recipe.objective.deep:
        encoder = replace(encoder, levels=norm_levels[-1:])
    predictor = _predictor(recipe.model)
    streams = streams_of(recipe)
    warmup, horizon = _learning_rate(recipe.optim, steps)
    momentum = _momentum(recipe.optim, steps)
    final_momentum = recipe.optim.ema.final_momentum
    # With image and video ranks, one rank takes their places in turn.
    mix = data.mix if recipe.ranks.rank_ratio is None else "alternate"
    alternates = mix == "alternate"
    clips = math.fsum(s.clips * (s.share if alternates else 1.0) for s in streams.values())
    resolved = Resolved(
        encoder=encoder,
        norm_levels=norm_levels,
        predictor=predictor,
        teacher=_teacher(recipe),
        level_weights=_level_weights(recipe.objective, len(encoder.levels)),
        streams=streams,
        mix=mix,
        clips_per_step=clips * recipe.optim.accumulate,
        steps=steps,
        warmup=warmup,
        horizon=horizon,
        ramp=_ramp(recipe.objective, steps),
        guard_start=in_steps(recipe.guard.start, steps),
        momentum=momentum,
        final_momentum=momentum if final_momentum is None else final_momentum,
        notes=(),
    )
    return replace(resolved, notes=tuple(_notes(recipe, resolved)))


def in_steps(duration: Duration, steps: int) -> int:
    """Whole steps of a duration: itself, or a share (`5%`) of a run of `steps`, rounded."""
    if isinstance(duration, int):
        return duration
    return round(float(duration.removesuffix("%")) / 100.0 * steps)


def _size(section: str, sizes: Sizes) -> EncoderSize:
    preset = PRESETS[sizes.name]
    width, depth = sizes.width or preset.width, sizes.depth or preset.depth
    heads = sizes.heads or preset.heads
    _check_heads(section, width, heads)
    mlp_width = sizes.mlp_width or width * preset.mlp_width // preset.width
    return EncoderSize(width, depth, heads, mlp_width, default_levels(depth))


def _encoder(model: Model) -> EncoderSize:
    size = _size("model", model)
    depth, levels = size.depth, size.levels if model.levels is None else model.levels
    if not levels or list(levels) != sorted(set(levels)) or levels[0] < 0:
        raise RecipeError(
            f"model.levels: {list(levels)} does not fit; expected block indices from 0 "
            f"in rising order, for example {list(default_levels(depth))}"
        )
    if levels[-1] != depth - 1:
        raise RecipeError(
            f"model.levels: {list(levels)} does not end with {depth - 1}, "
            f"the last of {depth} blocks, whose norm gives the features"
        )
    return replace(size, levels=levels)


def _teacher(recipe: Recipe) -> EncoderSize | None:
    if recipe.distill is None:
        return None
    if recipe.objective.deep:
        raise RecipeError(
            "objective.deep: true, but a teacher (distill.teacher) gives the targets of its last "
            "level alone; expected false"
        )
    size = _size("distill", recipe.distill)
    return replace(size, levels=size.levels[-1:])


def _predictor(model: Model) -> PredictorSize:
    size = model.predictor
    _check_heads("model.predictor", size.width, size.heads)
    return PredictorSize(size.width, size.depth, size.heads, 4 * size.width)


def _check_heads(section: str, width: int, heads: int) -> None:
    if width % heads:
        wide = range(SMALLEST_HEAD, width + 1, 2)
        near = sorted(
            (width // channels for channels in wide if width % channels == 0),
            key=lambda count: abs(count - heads),
        )
        fits = " or ".join(map(str, sorted(near[:2]))) or "another width"
        raise RecipeError(
            f"{section}.heads: {heads} do not divide a width of {width}; {fits} would"
        )
    if width // heads % 2 or width // heads < SMALLEST_HEAD:
        raise RecipeError(
            f"{section}.heads: {heads} heads of a width of {width} have "
            f"{width // heads} channels each; expected an even number of at least {SMALLEST_HEAD}"
        )


def _level_weights(objective: Objective, count: int) -> tuple[float, ...]:
    weights = objective.level_weights
    if weights is None:
        return (1.0 / count,) * count
    if len(weights) != count or not any(weights):
        raise RecipeError(
            f"objective.level_weights: {list(weights)} does not fit; "
            f"expected {count} weights, one for each supervised level, not all zero"
        )
    total = math.fsum(weights)
    return tuple(weight / total for weight in weights)


def _ramp(objective: Objective, steps: int) -> tuple[int, int] | None:
    if objective.ramp is None or not objective.dense:
        return None
    start, end = in_steps(objective.ramp.start, steps), in_steps(objective.ramp.end, steps)
    if end < start:
        raise RecipeError(
            f"objective.ramp.end: {objective.ramp.end} is step {end}, "
            f"expected a step from objective.ramp.start's {start}"
        )
    return start, end


def _learning_rate(optim: Optim, steps: int) -> tuple[int, int]:
    """Steps of warm-up, and the step where the decay ends."""
    warmup, horizon = in_steps(optim.warmup, steps), in_steps(optim.horizon, steps)
    if warmup > steps:
        raise RecipeError(
            f"optim.warmup: {optim.warmup} is longer than the run; "
            f"expected at most train.steps {steps}, or a share such as 10%"
        )
    if horizon <= warmup and optim.schedule != "constant":
        raise RecipeError(
            f"optim.horizon: {optim.horizon} is step {horizon}, "
            f"expected a step after optim.warmup's end at {warmup}"
        )
    if horizon < 1:
        raise RecipeError(
            f"optim.horizon: {optim.horizon} is no step of {steps}; expected at least 1"
        )
    return warmup, horizon


def _momentum(optim: Optim, steps: int) -> float:
    ema = optim.ema
    if ema.half_life is None:
        assert ema.momentum is not None
        return ema.momentum
    half_life = in_steps(ema.half_life, steps)
    if half_life < 1:
        raise RecipeError(
            f"optim.ema.half_life: {ema.half_life} is no step of {steps}; expected at least 1"
        )
    return float(0.5 ** (1.0 / half_life))


def _notes(recipe: Recipe, resolved: Resolved) -> Iterator[str]:
    data, steps = recipe.data, resolved.steps
    ratio = recipe.ranks.rank_ratio
    if ratio is not None:
        if data.image_share != ratio:
            yield f"data.image_share has no effect: ranks.rank_ratio {ratio:g} gives the share"
    elif not data.image or not data.video:
        only, other = ("images", "data.video") if data.image else ("videos", "data.image")
        yield f"only {only}: {other} is empty, so data.image_share has no effect"
    elif resolved.video is None or resolved.image is None:
        unread = "data.video" if resolved.video is None else "data.image"
        yield f"{unread} is not read: data.image_share is {data.image_share:g}"
    if data.lengths and resolved.video is None:
        yield "no videos are read, so data.lengths has no effect"
    if resolved.ramp and resolved.ramp[1] > steps:
        reached = "starts" if resolved.ramp[0] >= steps else "has its full weight"
        at = resolved.ramp[0] if resolved.ramp[0] >= steps else resolved.ramp[1]
        yield f"the context loss never {reached}: objective.ramp is at step {at} of {steps}"
    if recipe.guard.sigma is not None and resolved.guard_start >= steps:
        yield f"the guard's sigma never acts: guard.start is step {resolved.guard_start} of {steps}"
    if recipe.train.checkpoint_every > steps:
        every = recipe.train.checkpoint_every
        yield f"one checkpoint, at the end: train.checkpoint_every is {every} of {steps} steps"
