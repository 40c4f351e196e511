"""What each step does, as pure functions of its number: which micro-batches, and which schedule
values.

Nothing about a run's progress is stored but the step: position in the data, learning rate, EMA
momentum and context weight all follow from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import floor
from typing import Literal

from fastjepa.objective.context_ramp import context_weight
from fastjepa.optim.schedules import Shape, ema_momentum, learning_rate, weight_decay


@dataclass(frozen=True)
class Draw:
    """One micro-batch of a step: its stream and the weight of its loss."""

    stream: str
    share: float


@dataclass(frozen=True)
class StepPlan:
    """The run as a function of the step, counted from 0.

    `shares` are the streams' weights in an update (`video`, `video_64f`, `image`, ...), sum 1;
    `weight` scales all of them: that of this rank's loss in the mean over the ranks.
    `mix` accumulate: every step holds `accumulate` micro-batches of each stream, weighed by its
    share. `mix` alternate: a step is all of one stream, images every 1 / share steps and so on;
    the same on average (docs/method.md section 6). `context_weights` are lambda's full values.
    """

    steps: int
    accumulate: int
    mix: Literal["accumulate", "alternate"]
    shares: Mapping[str, float]
    context_weights: Mapping[str, float]
    ramp: tuple[int, int] | None
    shape: Shape
    start_lr: float
    peak_lr: float
    final_lr: float
    warmup: int
    horizon: int
    start_decay: float
    final_decay: float | None
    start_momentum: float
    final_momentum: float
    weight: float = 1.0

    def draws(self, step: int) -> list[Draw]:
        """The micro-batches of a step, in order; their shares add up to `weight`."""
        shares = self.shares
        if self.mix == "alternate":
            before, after = self._taken(step), self._taken(step + 1)
            shares = {name: 1.0 for name in shares if after[name] > before[name]}
        return [
            Draw(stream, self.weight * share / self.accumulate)
            for stream, share in shares.items()
            for _ in range(self.accumulate)
        ]

    def position(self, step: int, stream: str) -> int:
        """Micro-batches of a stream that the steps before `step` have used."""
        used = step if self.mix == "accumulate" else self._taken(step)[stream]
        return used * self.accumulate

    def lr(self, step: int) -> float:
        return learning_rate(
            step, shape=self.shape, start=self.start_lr, peak=self.peak_lr, final=self.final_lr,
            warmup=self.warmup, horizon=self.horizon,
        )  # fmt: skip

    def decay(self, step: int) -> float:
        return weight_decay(
            step, start=self.start_decay, final=self.final_decay, horizon=self.horizon
        )

    def momentum(self, step: int) -> float:
        return ema_momentum(
            step, start=self.start_momentum, final=self.final_momentum, horizon=self.horizon
        )

    def context_weight(self, step: int, stream: str) -> float:
        return context_weight(step, self.context_weights[stream], self.ramp)

    def _taken(self, steps: int) -> dict[str, int]:
        """Of the first `steps` alternating steps, how many were each stream's.

        The last stream takes its share of the steps, the one before it its share of the others,
        and the first what is left: each a pure function of how many steps there were.
        """
        names, taken, rest = list(self.shares), {}, 1.0
        for name in reversed(names[1:]):
            # A hair above, so that a share such as 0.1 counts ten steps as one step of its own.
            taken[name] = floor(steps * (self.shares[name] / rest) + 1e-9)
            steps, rest = steps - taken[name], rest - self.shares[name]
        return taken | {names[0]: steps}
