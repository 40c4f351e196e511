"""Seconds of each stage of a training step, while somebody listens.

    with StageClock(device) as clock:
        train_step(...)
    clock.seconds  # {"target": 0.21, "context": 0.34, ...}

The step names its stages with `stage`, which costs next to nothing as long as no clock and no
profiler runs. A running clock waits for the device at both ends of a stage, so a step that is timed
as a whole runs without it.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType

import torch

# In the order of a step; a batch's loading comes before the first.
STAGES = ("target", "context", "predictor", "loss", "backward", "optimizer", "EMA")

_listening: "StageClock | None" = None


class StageClock:
    """Adds up the seconds of each stage that runs inside it. Stages do not nest, nor do clocks."""

    def __init__(
        self, device: torch.device, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._device, self._clock = device, clock

    def __enter__(self) -> "StageClock":
        global _listening
        assert _listening is None, "a clock is running already"
        _listening = self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _listening
        _listening = None

    def now(self) -> float:
        """Seconds, once the device has done all it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._clock()


@contextmanager
def stage(name: str) -> Iterator[None]:
    """The block is the stage `name`, one of `STAGES`."""
    clock = _listening
    with named(name):
        if clock is None:
            yield
            return
        begin = clock.now()
        yield
        clock.seconds[name] += clock.now() - begin


def named(name: str) -> AbstractContextManager[object]:
    """The block has this name in a profiler's trace, if one is recorded."""
    return torch.profiler.record_function(f"fastjepa: {name}")
