"""The cases of `fastjepa bench kernels` under pytest-benchmark, for its statistics and histories.

    pytest benchmarks/test_kernels.py --benchmark-group-by=group --benchmark-columns=median,iqr
    pytest benchmarks/test_kernels.py -k "dense_l1 and vitl" --benchmark-autosave

GPU shapes need a CUDA device; there a round ends when the device has finished, and its inputs
rotate through more memory than the L2 holds. CPU shapes run anywhere. The normal tests do not
collect this file.
"""

import gc
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import pytest
import torch

from fastjepa.bench.case import Case, Forward
from fastjepa.bench.official import RESTATED
from fastjepa.bench.shapes import SETS, Shape
from fastjepa.bench.timing import sets_to_rotate
from fastjepa.bench.ways import CASES, check_agreement, ways

ROUNDS = {"cpu": 5, "cuda": 30}


def where(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("GPU shapes need a CUDA device, and PyTorch finds none")
    return torch.device(name)


@pytest.fixture(autouse=True)
def _freed() -> Iterator[None]:
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def parameters() -> Iterator[Any]:
    for set_name, device in (("cpu", "cpu"), ("gpu", "cuda")):
        for shape in SETS[set_name]:
            for name, case in CASES.items():
                for way in ("ours", "formula", "official", *(["compiled"] * (device == "cuda"))):
                    yield pytest.param(case, shape, way, device, id=f"{name}-{shape.name}-{way}")


@pytest.mark.parametrize(("case", "shape", "way", "device"), parameters())
def test_kernel(benchmark: Any, case: type[Case], shape: Shape, way: str, device: str) -> None:
    place, compiled = where(device), way == "compiled"
    check_agreement(case, RESTATED, place, compiled=compiled)
    count = sets_to_rotate(case.work(shape).bytes, place)
    made = [case(shape, place, seed) for seed in range(count)]
    forwards = cycle([(one, ways(one, RESTATED, compiled=compiled)[way]) for one in made])

    def run(one: Case, forward: Forward) -> None:
        one.run(forward)
        if place.type == "cuda":
            torch.cuda.synchronize(place)

    benchmark.group = f"{case.name} {shape.name}"
    benchmark.extra_info.update(bytes=case.work(shape).bytes, flops=case.work(shape).flops)
    benchmark.pedantic(
        run, setup=lambda: (next(forwards), {}), rounds=ROUNDS[device], warmup_rounds=2
    )
