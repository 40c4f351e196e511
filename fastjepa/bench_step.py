"""`fastjepa bench step`: a recipe's whole step, beside that of an official checkout.

    for results in measure(Setting(Path("configs/demo.yaml")), [], rounds=5, say=print, command=""):
        results.save(Path("step.json"))

All sides start from the same weights and make the same steps, in turn in one process, on one batch
of the recipe's first stream and the masks of its first steps. Peak memory is that of a side alone
in a fresh process. bench/ holds what measures and knows no recipe.
"""

import gc
import itertools
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from fastjepa.bench.checkout import make_importable
from fastjepa.bench.launches import count_on_device, count_step
from fastjepa.bench.machine import commit, device_facts, versions
from fastjepa.bench.memory import peak_and_kept
from fastjepa.bench.official import commit_of
from fastjepa.bench.official_step import OfficialStep, Sizes, Update
from fastjepa.bench.our_step import OurStep, as_on_a_gpu
from fastjepa.bench.step import ClipAndMasks, Step, in_turn, matrix_rates, stages, traced, traffic
from fastjepa.bench.step_results import OFFICIAL, OURS, Counted, Memory, Point, Side, StepResults
from fastjepa.build import DTYPES, build_engine, build_jepa, device_of
from fastjepa.build_data import build_loader
from fastjepa.config.load import load_recipe
from fastjepa.config.resolve import Resolved, resolve
from fastjepa.config.schema import Recipe
from fastjepa.config.streams import Stream
from fastjepa.data.augment import normalise
from fastjepa.estimate import StreamCosts
from fastjepa.masking.batch import counts
from fastjepa.observe.flops import TokenNumbers, mean_flops, step_flops
from fastjepa.recipe_parts import mask_maker

# A step's memory is that of the last of so many: the first one makes the optimizer's moments.
_STEPS_FOR_MEMORY = 2
# Before they are timed, all steps run so often that each has run once and these many have: the
# numbers of tokens that masks leave are few and recur in training, and what is done once for each
# is not a step's (oneDNN compiles products, attention's backends are measured, networks compiled).
_WARM_UP = {"cpu": 1, "cuda": 8}
# Seconds for which a matrix product is repeated at most.
_LONGEST_HOLD = 3.0
# What the official step always does.
_AS_OFFICIAL: dict[str, object] = {
    "objective.dense": True, "objective.deep": True, "objective.level_weights": None,
    "objective.distance_weights": True, "objective.loss_exp": 1.0,
    "objective.normalize_predictor": False, "model.levels": None, "model.rope": "interleaved",
    "model.interpolate_rope": True, "masks.truncate": True, "optim.clip": None,
    "engine.kind": "torch",
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What is measured: a recipe with its overrides, an official checkout, and its dtype (None:
    the recipe's on a GPU, float32 on a CPU, where the official code has no other)."""

    recipe: Path
    overrides: tuple[str, ...] = ()
    reference: Path | None = None
    reference_dtype: str | None = None
    compiled: bool = False
    random_clips: bool = False

    def load(self) -> "Loaded":
        """Raises RecipeError, and ValueError for a recipe whose step the official code, or one
        process, cannot make."""
        recipe = load_recipe(self.recipe, self.overrides)
        if recipe.engine.kind != "torch":
            raise ValueError("engine.kind: bench step measures one process; expected torch")
        if recipe.distill is not None:
            raise ValueError("distill: bench step measures steps without a teacher; expected null")
        if self.reference is not None:
            for key, official in _AS_OFFICIAL.items():
                found: Any = recipe
                for name in key.split("."):
                    found = getattr(found, name)
                if found != official:
                    raise ValueError(f"--reference: the official step has {key} {official}")
        resolved = resolve(recipe)
        return Loaded(self, recipe, resolved, next(iter(resolved.streams.values())))

    @property
    def sides(self) -> tuple[str, ...]:
        plain = (OURS,) if self.reference is None else (OURS, OFFICIAL)
        return (*plain, *(f"{side} compiled" for side in plain)) if self.compiled else plain


@dataclass(frozen=True)
class Loaded:
    """A setting's recipe, read and resolved, and the stream whose step is made."""

    setting: Setting
    recipe: Recipe
    resolved: Resolved
    stream: Stream

    @property
    def device(self) -> torch.device:
        return device_of(self.recipe.engine.device)

    def dtype(self, side: str) -> str:
        if side.startswith(OFFICIAL):
            on_cpu = "float32" if self.device.type == "cpu" else None
            return self.setting.reference_dtype or on_cpu or self.recipe.engine.dtype
        return self.recipe.engine.dtype

    def build(self, side: str) -> Step:
        """One side's step, from the recipe's weights."""
        recipe, resolved, stream, device = self.recipe, self.resolved, self.stream, self.device
        optim, predictor = recipe.optim, resolved.predictor
        update = Update(
            stream.context_weight, recipe.objective.offset, optim.start_lr, optim.weight_decay,
            optim.betas, optim.eps, resolved.momentum,
        )  # fmt: skip
        if side == f"{OURS} compiled":
            engine = recipe.engine.model_copy(update={"compile": "blocks"})
            recipe = recipe.model_copy(update={"engine": engine})
        torch.manual_seed(recipe.run.seed)
        jepa = build_jepa(recipe, resolved, device)
        if not side.startswith(OFFICIAL):
            return OurStep(jepa, build_engine(recipe, jepa, device), update)
        assert self.setting.reference is not None
        sizes = Sizes(
            stream.crop, stream.frames, recipe.model.patch, recipe.model.tubelet, resolved.encoder,
            (predictor.width, predictor.depth, predictor.heads,
             recipe.model.predictor.mask_tokens),
        )  # fmt: skip
        return OfficialStep(
            self.setting.reference, sizes, update,
            weights=(jepa.encoder.state_dict(), jepa.predictor.state_dict()),
            dtype=DTYPES[self.dtype(side)], device=device, compiled=side.endswith("compiled"),
        )  # fmt: skip

    def batches(self, count: int) -> tuple[list[ClipAndMasks], float]:
        """One batch of clips with the masks of as many steps, and the seconds in which one process
        loads and normalises it: the recipe's first, or random numbers, which take none."""
        maker = replace(mask_maker(self.recipe, self.stream), weigh=False)
        clip, seconds = self._random_batch() if self.setting.random_clips else self._first_batch()
        return [(clip, maker(number).to(self.device)) for number in range(count)], seconds

    def _random_batch(self) -> tuple[Tensor, float]:
        stream, generator = self.stream, torch.Generator().manual_seed(self.recipe.run.seed)
        shape = stream.clips, 3, stream.frames, stream.crop, stream.crop
        return torch.randn(shape, generator=generator).to(self.device), 0.0

    def _first_batch(self) -> tuple[Tensor, float]:
        alone = self.recipe.data.model_copy(update={"workers": 0})
        recipe = self.recipe.model_copy(update={"data": alone})
        loader = build_loader(recipe, self.stream, self.device)
        begin = time.perf_counter()
        clip = normalise(next(iter(loader.batches(0, 1))).clip.to(self.device))
        seconds = time.perf_counter() - begin
        loader.close()
        return clip, seconds


def measure(
    setting: Setting,
    sweeps: Sequence[str],
    *,
    rounds: int,
    command: str,
    say: Callable[[str], None],
    memory: bool = True,
    kernels: bool = True,
    trace: Path | None = None,
) -> Iterator[StepResults]:
    """Measure the setting, or each combination of what `sweeps` (`key=v1,v2`) let vary: all that is
    known, each time there is more, so that nothing timed is lost to an end that comes early.

    Raises ValueError for a sweep that is no such text, for what `Setting.load` refuses, and for
    what the official code does not know.
    """
    settings = list(_swept(setting, sweeps))
    for one, _ in settings:
        one.load()
    if setting.reference is not None:
        make_importable(setting.reference)
    reference = "" if setting.reference is None else commit_of(setting.reference)
    found = StepResults(
        command, commit(), reference, device_facts(setting.load().device),
        versions("torch", "triton", "fastjepa"), [],
    )  # fmt: skip
    for one, changes in settings:
        known = found
        for point in _point(one, changes, rounds, say, memory, kernels, trace):
            found = replace(known, points=[*known.points, point])
            yield found


def _swept(setting: Setting, sweeps: Sequence[str]) -> Iterator[tuple[Setting, dict[str, str]]]:
    axes = []
    for sweep in sweeps:
        key, _, values = sweep.partition("=")
        if not key or not values:
            raise ValueError(f"--sweep {sweep}: expected KEY=VALUE,VALUE,...")
        axes.append([(key, value) for value in values.split(",")])
    for chosen in itertools.product(*axes):
        overrides = (*setting.overrides, *(f"{key}={value}" for key, value in chosen))
        yield replace(setting, overrides=overrides), dict(chosen)


def _point(
    setting: Setting,
    changes: dict[str, str],
    rounds: int,
    say: Callable[[str], None],
    memory: bool,
    kernels: bool,
    trace: Path | None,
) -> Iterator[Point]:
    """The point once its steps are timed, and once more with what is measured of single steps."""
    loaded = setting.load()
    stream, device = loaded.stream, loaded.device
    name = " ".join(f"{key}={value}" for key, value in changes.items()) or setting.recipe.name
    alone: dict[str, Memory | None] = dict.fromkeys(setting.sides)
    if memory:
        say(f"{name}: memory of each side alone")
        alone = {side: _alone(_memory, setting, side) for side in setting.sides}
    say(f"{name}: steps in turn")
    passes = math.ceil(_WARM_UP[device.type] / rounds)
    batches, data = loaded.batches(rounds)
    built = {side: loaded.build(side) for side in setting.sides}
    sides = {
        side: Side(
            loaded.dtype(side), found.rounds, found.processor, found.losses, memory=alone[side]
        )
        for side, found in in_turn(built, batches * (passes + 1), rounds * passes).items()
    }
    tokens = [
        TokenNumbers(stream.tokens, context, predicted, image=stream.frames == 1)
        for context, predicted in counts(
            replace(mask_maker(loaded.recipe, stream), weigh=False), range(rounds)
        )
    ]
    costs = StreamCosts(loaded.recipe, loaded.resolved)
    flops = mean_flops(
        [step_flops(costs.encoder, costs.predictor, one, batch=stream.clips) for one in tokens]
    )
    # Held for as long as the steps took, but for no more than is needed to see it.
    hold = min(_LONGEST_HOLD, sum(sum(side.rounds) for side in sides.values()))
    rates = {
        dtype: matrix_rates(DTYPES[dtype], device, hold)
        for dtype in dict.fromkeys(side.dtype for side in sides.values())
    }
    timed = Point(
        changes, loaded.recipe.model.name, stream.frames, stream.crop, stream.clips, stream.tokens,
        tuple(fmean(kept) for kept in zip(*(one.context for one in tokens), strict=True)),
        tuple(fmean(kept) for kept in zip(*(one.predicted for one in tokens), strict=True)),
        {
            part: getattr(flops, part).total
            for part in ("target", "context", "predictor", "loss")
        },
        data, sides,
        {dtype: best for dtype, (best, _) in rates.items()},
        {dtype: held for dtype, (_, held) in rates.items()},
    )  # fmt: skip
    yield timed
    say(f"{name}: stages, bytes and operations")
    whole = {}
    for side, step in built.items():
        # A compiled step is not dispatched operation by operation.
        counted = None
        if not side.endswith("compiled"):
            counted = _counted(setting, side, step, batches[-1], device, kernels)
        path = trace and trace / f"{side}.json".replace(" ", "-")
        whole[side] = replace(
            sides[side],
            stages=stages(step, batches[-1], device),
            counted=counted,
            traced=traced(step, batches[-1], device, path),
        )
    del built, batches, step
    gc.collect()
    yield replace(timed, sides=whole)


def _counted(
    setting: Setting,
    side: str,
    step: Step,
    batch: ClipAndMasks,
    device: torch.device,
    kernels: bool,
) -> Counted:
    """At the step's own shape on its device. Without a GPU ours runs the blocks of a GPU for it,
    and kernels are counted on a tiny grid, ours in Triton's interpreter."""
    if device.type == "cuda":
        launched: int | None = count_on_device(lambda: step(*batch)) if kernels else None
        return Counted(*traffic(step, batch), launched)
    launched = None
    if kernels and find_spec("triton"):
        with _interpreted():
            launched = _alone(_kernels, setting, side)
    with as_on_a_gpu(step):
        return Counted(*traffic(step, batch), launched)


@contextmanager
def _interpreted() -> Iterator[None]:
    """Processes started inside run Triton in its interpreter."""
    os.environ["TRITON_INTERPRET"] = "1"
    yield
    del os.environ["TRITON_INTERPRET"]


def _alone(measure: Callable[..., Any], setting: Setting, side: str) -> Any:
    """`measure(setting, side, threads)` in a fresh process."""
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=fresh) as pool:
        return pool.submit(measure, setting, side, torch.get_num_threads()).result()


def _memory(setting: Setting, side: str, threads: int) -> Memory:
    torch.set_num_threads(threads)
    loaded = setting.load()

    def steps() -> Step:
        step = loaded.build(side)
        for number in range(_STEPS_FOR_MEMORY):
            step(clip, maker(number).to(loaded.device))
        return step

    maker = replace(mask_maker(loaded.recipe, loaded.stream), weigh=False)
    stream = loaded.stream
    clip = torch.zeros(stream.clips, 3, stream.frames, stream.crop, stream.crop)
    clip = clip.to(loaded.device)
    return Memory(*peak_and_kept(steps, loaded.device))


def _kernels(setting: Setting, side: str, threads: int) -> int:
    torch.set_num_threads(threads)
    model = setting.load().recipe.model
    small = [
        "model.width=48", "model.heads=2", "model.mlp_width=96", "model.predictor.width=48",
        "model.predictor.heads=2", f"data.frames={2 * model.tubelet}",
        f"data.crop={4 * model.patch}", f"data.image_crop={4 * model.patch}", "data.batch=2",
        "data.image_batch=2", "data.lengths=[]",
    ]  # fmt: skip
    loaded = replace(setting, overrides=(*setting.overrides, *small)).load()
    stream = loaded.stream
    masks = replace(mask_maker(loaded.recipe, stream), weigh=False)(0)
    clip = torch.zeros(stream.clips, 3, stream.frames, stream.crop, stream.crop)
    step = loaded.build(side)
    with as_on_a_gpu(step):
        return count_step(lambda: step(clip, masks), ours=side == OURS)
