"""`fastjepa bench kernels`: measure cases at shapes, all ways in turn.

results = measure(cases, shapes, device=torch.device("cpu"), official=RESTATED, ...)
"""

import gc
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from fastjepa.bench.case import Case
from fastjepa.bench.launches import count_interpreted, count_on_device
from fastjepa.bench.machine import commit, device_facts, versions
from fastjepa.bench.memory import peak_extra
from fastjepa.bench.official import Official
from fastjepa.bench.results import Figure, Results, Row
from fastjepa.bench.shapes import SETS, Shape
from fastjepa.bench.timing import copy_bandwidth, in_turn, sets_to_rotate
from fastjepa.bench.ways import check_agreement, ways


def measure(
    cases: Sequence[type[Case]],
    shapes: Sequence[Shape],
    *,
    device: torch.device,
    official: Official,
    compiled: bool,
    repeats: int,
    command: str,
    say: Callable[[str], None],
) -> Results:
    """Check that all ways agree, then measure each case at each shape.

    On a CPU the least work at the GPU shapes comes with it, its figures not measured. `say` hears
    what is being done. Raises ValueError if a way gives other numbers than the formula.
    """
    for case in cases:
        say(f"checking {case.name}")
        check_agreement(case, official, device, compiled=compiled)
    counted = {}
    if device.type != "cuda" and find_spec("triton"):
        say("counting launches in Triton's interpreter")
        counted = count_interpreted([case.name for case in cases])
    rows = []
    for shape in shapes:
        for case in cases:
            say(f"timing {case.name} at {shape.name}")
            rows.append(_measured(case, shape, device, official, compiled, repeats))
    if device.type != "cuda":
        unmeasured = [shape for shape in SETS["gpu"] if shape not in shapes]
        rows += [_row(case, shape) for shape in unmeasured for case in cases]
    return Results(
        command=command,
        commit=commit(),
        device=device_facts(device),
        versions=versions("torch", "triton", "fastjepa"),
        official=official.source,
        copy_bytes_per_second=copy_bandwidth(device),
        rows=rows,
        counted=counted,
    )


def _row(case: type[Case], shape: Shape, figures: dict[str, Figure] | None = None) -> Row:
    work = case.work(shape)
    dtype = str(shape.dtype).removeprefix("torch.")
    return Row(case.name, case.measures, shape.name, dtype, work.bytes, work.flops, figures or {})


def _measured(
    case: type[Case],
    shape: Shape,
    device: torch.device,
    official: Official,
    compiled: bool,
    repeats: int,
) -> Row:
    count = sets_to_rotate(case.work(shape).bytes, device)
    made = [case(shape, device, seed) for seed in range(count)]
    calls: dict[str, list[Callable[[], Any]]] = {}
    for one in made:
        for name, forward in ways(one, official, compiled=compiled).items():
            calls.setdefault(name, []).append(partial(one.run, forward))
    rounds = in_turn(calls, device, repeats)
    figures = {}
    for name, (call, *_) in calls.items():
        if name not in rounds:
            figures[name] = Figure(None, [], None, note="out of memory")
            continue
        launches = count_on_device(call) if device.type == "cuda" else None
        figures[name] = Figure(
            statistics.median(rounds[name]), rounds[name], peak_extra(call, device), launches
        )
    del made, calls
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return _row(case, shape, figures)
