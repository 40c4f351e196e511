"""Steps of several sides in turn in one process, on the same clips and masks.

    sides = {"ours": step, "official": other}  # each takes a clip and its masks, returns the loss
    rounds = in_turn(sides, batches)

What is timed as a whole is not watched: stages, bytes and operations come from steps of their own.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fastjepa.bench.timing import in_turn as calls_in_turn
from fastjepa.bench.timing import seconds
from fastjepa.bench.traffic import Traffic
from fastjepa.masking.batch import Masks
from fastjepa.observe.profile import profiler
from fastjepa.observe.stages import StageClock
from fastjepa_kernels.precision import as_multiplied

Step = Callable[[Tensor, Masks], float]
ClipAndMasks = tuple[Tensor, Masks]

# Sides of the product whose rate stands for what the device can do.
_SIDE = {"cuda": 8192, "cpu": 1536}
# Operations named in a profile, the slowest first.
_NAMED = 12


@dataclass
class Timed:
    """Seconds of the steps by the clock and of all processors, and every step's loss."""

    rounds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def in_turn(
    sides: Mapping[str, Step], batches: Sequence[ClipAndMasks], warm_up: int
) -> dict[str, Timed]:
    """Each side's step on each batch; of the first `warm_up` the loss alone counts."""
    found = {name: Timed() for name in sides}
    for number, (clip, masks) in enumerate(batches):
        for name, step in sides.items():
            begin, used = time.perf_counter(), time.process_time()
            loss = step(clip, masks)  # a float: the device has done its work
            if number >= warm_up:
                found[name].processor.append(time.process_time() - used)
                found[name].rounds.append(time.perf_counter() - begin)
            found[name].losses.append(loss)
    return found


def stages(step: Step, batch: ClipAndMasks, device: torch.device) -> dict[str, float]:
    """Seconds of each stage of one step; what lies between them is `other`."""
    begin = time.perf_counter()
    with StageClock(device) as clock:
        step(*batch)
    whole = time.perf_counter() - begin
    return clock.seconds | {"other": max(0.0, whole - sum(clock.seconds.values()))}


def traffic(step: Step, batch: ClipAndMasks) -> tuple[int, int]:
    """Operations of one step and the bytes they read and write."""
    with Traffic() as counter:
        step(*batch)
    return counter.operations, counter.bytes


def traced(
    step: Step, batch: ClipAndMasks, device: torch.device, trace: Path | None
) -> list[tuple[str, int, float]]:
    """The operations that take longest in one step: name, calls, seconds in all. `trace` is where
    a Chrome trace goes."""
    with profiler(device) as record:
        step(*batch)
    if trace is not None:
        record.export_chrome_trace(str(trace))
    on_gpu = device.type == "cuda"
    rows = [
        (row.key, row.count, (row.self_device_time_total if on_gpu else row.self_cpu_time_total))
        for row in record.key_averages()
    ]
    rows.sort(key=lambda row: -row[2])
    return [(name, count, micros / 1e6) for name, count, micros in rows[:_NAMED]]


def matrix_rates(dtype: torch.dtype, device: torch.device, hold: float) -> tuple[float, float]:
    """Operations a second of a large square product of `dtype`, multiplied in what is fast there:
    the best of some short rounds, and what is held for `hold` seconds, in which a GPU reaches the
    limit of its power and lowers its clock, as it does in training."""
    side = _SIDE[device.type]
    random = torch.Generator(device).manual_seed(0)
    numbers = (torch.randn(side, side, device=device, generator=random) for _ in range(2))
    a, b = (as_multiplied(matrix.to(dtype)) for matrix in numbers)
    out = torch.empty_like(a)

    def product() -> None:
        torch.mm(a, b, out=out)

    best = min(calls_in_turn({"product": [product]}, device, repeats=5)["product"])
    times = max(1, round(hold / best))
    held = seconds([product], times, device)
    return 2 * side**3 / best, 2 * side**3 / held
