"""How fast a run goes: clips, tokens and operations a second, step time, and the share spent
waiting for data.

Wall clock of the host only: it never waits for the device. Where steps are queued ahead of the
device, an interval that ends in a synchronisation (as a logged step does when it reads its loss) is
right on average.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Throughput:
    """Meter of the interval since the last `read`.

    with meter.waiting():
        batch = next(batches)
    ...
    meter.step(clips=24, tokens=24 * 2048, flops=10**15)
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._reset()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the block's time as waiting for data."""
        started = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the block's time (a checkpoint, a picture) out of the interval."""
        started = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - started

    def step(self, *, clips: int, tokens: int, flops: int) -> None:
        """Count one optimizer step of `clips` samples that hold `tokens` grid tokens in all and
        cost `flops` operations of the model."""
        self._steps += 1
        self._clips += clips
        self._tokens += tokens
        self._flops += flops

    def read(self) -> dict[str, float]:
        """Rates since the last read, under the keys of metrics.jsonl; starts a new interval.

        `clips_per_second`, `tokens_per_second`, `flops_per_second`, `step_seconds`, `step_flops`,
        and `data_wait` as a share in 0..1.
        Empty, and the interval goes on, when no step was counted.
        """
        seconds = self._clock() - self._started - self._paused
        steps, clips, tokens, waited = self._steps, self._clips, self._tokens, self._waited
        flops = self._flops
        if not steps or seconds <= 0.0:
            return {}
        self._reset()
        return {
            "clips_per_second": clips / seconds,
            "tokens_per_second": tokens / seconds,
            "flops_per_second": flops / seconds,
            "step_seconds": seconds / steps,
            "step_flops": flops / steps,
            "data_wait": min(1.0, waited / seconds),
        }

    def _reset(self) -> None:
        self._started = self._clock()
        self._steps = self._clips = self._tokens = self._flops = 0
        self._waited = self._paused = 0.0
