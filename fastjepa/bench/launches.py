"""How many kernels a call launches.

On a GPU the profiler counts what ran on the device. Without one our ops' Triton kernels run in
Triton's interpreter on a tiny shape, in a process of its own, because Triton wants to know before
it is imported:

    python -m fastjepa.bench.launches dense_l1 mask_distance  # JSON, by name

There, PyTorch's part is the operations that are neither views nor allocations, a kernel each.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

# Views, allocations and wrappers: what they wrap is counted.
_NO_KERNEL = frozenset(
    f"aten::{name}"
    for name in (
        "_reshape_alias", "_to_copy", "_unsafe_view", "alias", "as_strided", "chunk", "clone",
        "contiguous", "detach", "empty", "empty_like", "empty_strided", "expand", "expand_as",
        "flatten", "item", "_local_scalar_dense", "lift_fresh", "movedim", "narrow", "new_empty",
        "new_zeros", "numpy_T", "permute", "reshape", "resize_", "resolve_conj", "resolve_neg",
        "result_type", "select", "set_", "slice", "split", "split_with_sizes", "squeeze", "t",
        "to", "transpose", "unbind", "unflatten", "unsafe_split", "unsqueeze", "view",
        "view_as_complex", "view_as_real", "zeros", "zeros_like", "ones", "full", "stack",
    )
)  # fmt: skip
_LAUNCH = "launch of a Triton kernel"


def count_on_device(call: Callable[[], object]) -> int:
    """Kernels, copies and fills that a call runs on the GPU."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in record.events() or ())


def count_interpreted(names: Iterable[str]) -> dict[str, dict[str, int]]:
    """Kernels of our ops, `triton` and `torch`, by case, from a process with Triton's interpreter.
    Raises ValueError if it fails, as it does without Triton."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", __name__, *names], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise ValueError(f"launches: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
    counts: dict[str, dict[str, int]] = json.loads(done.stdout)
    return counts


class _Counted:
    """A kernel whose launches the profiler sees."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **options: Any) -> None:
            with record_function(_LAUNCH):
                self.kernel[grid](*args, **options)

        return launch


def _make_launches_visible() -> None:
    from fastjepa_kernels.ahead_of_time import cases

    for _, case in cases():
        module = sys.modules[case.kernel.fn.__module__]
        setattr(module, case.kernel.fn.__name__, _Counted(case.kernel))
    # As on a GPU: kernels are chosen, and no values are looked at.
    as_on_a_gpu = {"use_triton": lambda *_: True, "reads_values": lambda _: False}
    for module in [m for n, m in sys.modules.items() if n.startswith("fastjepa_kernels.")]:
        for name, answer in as_on_a_gpu.items():
            if hasattr(module, name):
                setattr(module, name, answer)


def _own_kernels(event: FunctionEvent) -> int:
    """Kernels among an event and those below it; an operation is one if none is below it, and so
    is one on a list of tensors."""
    if event.name == _LAUNCH:
        return 0
    if event.name.startswith("aten::_foreach_"):
        return 1
    below = sum(_own_kernels(child) for child in event.cpu_children)
    return below or int(event.name.startswith("aten::") and event.name not in _NO_KERNEL)


def _count(call: Callable[[], object]) -> dict[str, int]:
    call()
    with profile(activities=[ProfilerActivity.CPU]) as record:
        call()
    events = list(record.events() or ())
    launches = sum(event.name == _LAUNCH for event in events)
    others = sum(_own_kernels(event) for event in events if event.cpu_parent is None)
    return {"triton": launches, "torch": others}


def count_step(step: Callable[[], object], *, ours: bool) -> int:
    """Kernels of a whole step on a CPU. `ours` launches Triton's; the process must have started
    with its interpreter."""
    if ours:
        _make_launches_visible()
    return sum(_count(step).values())


def main(names: list[str]) -> None:
    from fastjepa.bench.shapes import TINY
    from fastjepa.bench.ways import CASES

    _make_launches_visible()
    counts = {}
    half = replace(TINY, dtype=torch.float16)  # attention's kernels take no float32
    for name in names:
        case = CASES[name](half, torch.device("cpu"))
        counts[name] = _count(partial(case.run, case.ours))
    print(json.dumps(counts))


if __name__ == "__main__":
    main(sys.argv[1:])
