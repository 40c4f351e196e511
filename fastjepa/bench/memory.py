"""The most memory a call holds beyond what was there before it, and what it leaves behind."""

from collections.abc import Callable
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile


def peak_extra(call: Callable[[], object], device: torch.device) -> int:
    """Bytes at the peak of live allocations during `call`, its results included."""
    return peak_and_kept(call, device)[0]


def peak_and_kept(call: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """Bytes of live allocations at their peak during `call`, and of those its result keeps.

    Allocations are PyTorch's: from its allocator's statistics on a GPU, from its profiler's record
    on a CPU. What libraries hold beside them is not counted.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = int(torch.cuda.memory_allocated(device))
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        kept = int(torch.cuda.memory_allocated(device)) - before
        del result
        return int(torch.cuda.max_memory_allocated(device)) - before, kept
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = call()
    del result
    assert record.profiler is not None
    events = record.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = list(accumulate((size for _, size in changes), initial=0))
    return int(max(live)), int(live[-1])
