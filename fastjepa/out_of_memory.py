"""When memory runs out: one line that names the recipe's keys with which the run would fit.

    with remedies_told(recipe, ranks=8, device=device): ...

Bytes are the planner's (docs/planning.md). On a GPU a snapshot of the allocator goes into the run's
folder, for https://pytorch.org/memory_viz.
"""

import gc
import math
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations

import torch

from fastjepa.config.load import changed
from fastjepa.config.resolve import resolve
from fastjepa.config.schema import Recipe
from fastjepa.observe.memory import MemoryLimit, memory_limit
from fastjepa.observe.quantities import binary_size
from fastjepa.rank_memory import bytes_of_rank

# What PyTorch's allocator on the host and oneDNN say, in errors that have no type of their own.
_RAN_OUT = (
    "can't allocate memory", "not enough memory", "out of memory", "bad_alloc",
    "could not create a primitive", "could not create a memory",
)  # fmt: skip
# The run's own plan did not fit, whatever the limit says: a remedy takes this share of it at most.
_LESS = 0.8
# Share of a limit that may be planned for: the rest is workspace, libraries and gaps, which on a
# CPU are as much again as the tensors.
_USABLE, _USABLE_ON_HOST = 0.9, 0.5


class RanOutOfMemoryError(ValueError):
    """Memory did not suffice; the message says what would."""


@contextmanager
def remedies_told(recipe: Recipe, *, ranks: int, device: torch.device) -> Iterator[None]:
    """Turns an allocator's failure in the block into RanOutOfMemoryError."""
    if device.type == "cuda":
        # Where each block that lives was allocated: without it a snapshot shows sizes alone.
        torch.cuda.memory._record_memory_history("state", context="state", stacks="python")
    limit = memory_limit(device)
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _ran_out(error):
            raise
        snapshot = _snapshot(recipe) if device.type == "cuda" else ""
        # Lets go of the step's tensors: the planner needs some room, too.
        traceback.clear_frames(error.__traceback__)
        gc.collect()
        told = remedies(recipe, ranks=ranks, limit=limit, on_host=device.type == "cpu")
        first, _, _ = str(error).strip().partition("\n")
        raise RanOutOfMemoryError(
            f"out of memory: {told}{snapshot} ({first or 'MemoryError'})"
        ) from None


def _ran_out(error: RuntimeError | MemoryError) -> bool:
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or any(words in str(error) for words in _RAN_OUT)


def _snapshot(recipe: Recipe) -> str:
    path = recipe.run.folder / f"out-of-memory.rank-{os.environ.get('RANK', '0')}.pickle"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.cuda.memory._dump_snapshot(str(path))
    return f"; {path} has what was allocated"


def remedies(recipe: Recipe, *, ranks: int, limit: MemoryLimit, on_host: bool) -> str:
    """What this run plans for, and the fewest changes of keys that plan for enough less."""
    planned = bytes_of_rank(recipe, resolve(recipe), ranks=ranks)
    usable = _USABLE_ON_HOST if on_host else _USABLE
    room = min(int(usable * limit.bytes), int(_LESS * planned))
    found = list(_fitting(recipe, ranks, room, on_host=on_host))
    about = f"a rank plans about {binary_size(planned)}, {limit.what} {binary_size(limit.bytes)}"
    if not found:
        return f"{about}; no key of the recipe makes it fit: more ranks, or a smaller model"
    ways = " or ".join(f"{' '.join(keys)} (about {binary_size(size)})" for keys, size in found)
    return f"{about}; it would fit with {ways}"


def _fitting(
    recipe: Recipe, ranks: int, room: int, *, on_host: bool
) -> Iterator[tuple[list[str], int]]:
    """Every single change that fits, or else the first pair, or else the first triple."""
    changes = _changes(recipe, ranks, on_host=on_host)
    for count in range(1, len(changes) + 1):
        fits = []
        for chosen in combinations(changes, count):
            for keys in _spelled(chosen):
                size = _bytes_with(recipe, keys, ranks)
                if size is not None and size <= room:
                    fits.append((keys, size))
                    break
        if fits:
            yield from fits if count == 1 else fits[:1]
            return


def _bytes_with(recipe: Recipe, keys: list[str], ranks: int) -> int | None:
    """What a rank plans for with these keys; None where they do not go with the recipe."""
    try:
        other = changed(recipe, keys)
        return bytes_of_rank(other, resolve(other), ranks=ranks)
    except ValueError:
        return None


Change = list[list[str]]


def _spelled(chosen: tuple[Change, ...]) -> Iterator[list[str]]:
    """The overrides of some changes together: of each its mildest form first."""
    for strength in range(max(map(len, chosen))):
        yield [key for change in chosen for key in change[min(strength, len(change) - 1)]]


def _changes(recipe: Recipe, ranks: int, *, on_host: bool) -> list[Change]:
    """What could be changed, each in forms of rising strength that leave the samples of a step."""
    data, engine, found = recipe.data, recipe.engine, []
    if recipe.model.checkpointing is not True:
        found.append([["model.checkpointing=true"]])
    batches = {f"data.lengths.{i}.batch": length.batch for i, length in enumerate(data.lengths)}
    batches |= {"data.batch": data.batch} if data.video else {}
    batches |= {"data.image_batch": data.image_batch} if data.image else {}
    common = math.gcd(*batches.values())
    smaller = [
        [f"{key}={batch // part}" for key, batch in batches.items()]
        + [f"optim.accumulate={recipe.optim.accumulate * part}"]
        for part in range(2, common + 1)
        if common % part == 0
    ]
    if smaller:
        found.append(smaller)
    if engine.micro_batches == "packed":
        found.append([["engine.micro_batches=in_turn"]])
    most = 3 if engine.compile is None else 2  # compiled blocks need whole weights
    if engine.kind == "deepspeed" and ranks > 1 and engine.zero_stage < most:
        found.append([[f"engine.zero_stage={n}"] for n in range(engine.zero_stage + 1, most + 1)])
    # It moves states to the host, where they are already on a CPU.
    if not on_host and not engine.offload:
        kind = [] if engine.kind == "deepspeed" else ["engine.kind=deepspeed"]
        stage = [] if engine.zero_stage else ["engine.zero_stage=1"]
        found.append([[*kind, *stage, "engine.offload=true"]])
    return found
