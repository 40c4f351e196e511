"""How long calls take: medians of rounds in which all ways take their turn, and the bandwidth of a
plain copy on the same device.

On a GPU: CUDA events, and inputs that rotate through more memory than the L2 holds. On a CPU: the
clock; nothing rotates, since the inputs exceed its caches or the time is not memory's.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Call = Callable[[], object]

# A measurement repeats a call until it lasts about so many seconds.
_LONG_ENOUGH = 5e-3
_WARM_UP = 2
_MOST_SETS = 1000


def sets_to_rotate(nbytes: int, device: torch.device) -> int:
    """How many copies of inputs of `nbytes` exceed the L2 twice; 1 on a CPU."""
    if device.type != "cuda":
        return 1
    cache: int = torch.cuda.get_device_properties(device).L2_cache_size
    return min(_MOST_SETS, 1 + 2 * cache // nbytes)


def seconds(calls: Sequence[Call], times: int, device: torch.device) -> float:
    """Mean duration of a call over `times` of them, cycling through `calls`."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for number in range(times):
            calls[number % len(calls)]()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / times
    begin = time.perf_counter()
    for number in range(times):
        calls[number % len(calls)]()
    return (time.perf_counter() - begin) / times


def in_turn(
    ways: Mapping[str, Sequence[Call]], device: torch.device, repeats: int
) -> dict[str, list[float]]:
    """Seconds of each way in each round. Without an entry: it ran out of the device's memory."""
    times: dict[str, int] = {}
    for name, calls in ways.items():
        try:
            seconds(calls, _WARM_UP, device)
            times[name] = max(1, round(_LONG_ENOUGH / seconds(calls, 1, device)))
        except torch.OutOfMemoryError:
            pass
        if name not in times and device.type == "cuda":
            torch.cuda.empty_cache()
    rounds: dict[str, list[float]] = {name: [] for name in times}
    for _ in range(repeats):
        for name, count in times.items():
            rounds[name].append(seconds(ways[name], count, device))
    return rounds


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a large copy within the device."""
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    rounds = in_turn({"copy": [copy]}, device, repeats=11)["copy"]
    return 2 * size / statistics.median(rounds)
