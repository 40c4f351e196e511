"""Clips a second from loaders that take turns, each with worker processes of its own.

turns = in_turn({"pyav": ours, "official": theirs}, seconds=10.0, ready=4, rounds=5)
"""

import time
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from fastjepa.bench.data_results import Turn
from fastjepa.observe.processes import children, cpu_seconds, own_bytes

# Processes are at rest when they use less than this share of a core over one look.
_AT_REST, _LOOK = 0.1, 0.25
_PATIENCE = 60.0

Clips = Iterator[Tensor]


def in_turn(
    loaders: Mapping[str, Callable[[], Clips]], *, seconds: float, ready: int, rounds: int
) -> tuple[dict[str, list[Turn]], dict[str, int]]:
    """Turns of each loader, and the bytes that its processes came to hold.

    A loader gives batches [B, ...] without end, and keeps at most `ready` of them ready; those are
    taken before a turn's clock starts. A turn ends with the first batch after `seconds`. While one
    has its turn the others are at rest.
    """
    started: dict[str, tuple[Clips, set[int]]] = {}
    for name, start in loaders.items():
        before = children()
        clips = start()
        next(clips)
        started[name] = clips, children() - before
    turns: dict[str, list[Turn]] = {name: [] for name in loaders}
    held = dict.fromkeys(loaders, 0)
    for _ in range(rounds):
        for name, (clips, processes) in started.items():
            _rest()
            turns[name].append(_turn(clips, seconds, ready))
            held[name] = max(held[name], own_bytes(processes))
    return turns, held


def _turn(clips: Clips, seconds: float, ready: int) -> Turn:
    for _ in range(ready):
        next(clips)
    used, begin = cpu_seconds(), time.perf_counter()
    count = 0
    while (wall := time.perf_counter() - begin) < seconds or not count:
        count += len(next(clips))
    return Turn(count / wall, (cpu_seconds() - used) / count)


def _rest() -> None:
    """Wait until the workers have made ready what they may."""
    until = time.perf_counter() + _PATIENCE
    used = cpu_seconds()
    while time.perf_counter() < until:
        time.sleep(_LOOK)
        now = cpu_seconds()
        if now - used < _AT_REST * _LOOK:
            return
        used = now
