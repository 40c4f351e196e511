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

Modality = Literal["video", "image"]


@dataclass(frozen=True)
class Draw:
    """One micro-batch of a step: its modality and the weight of its loss."""

    modality: Modality
    share: float


@dataclass(frozen=True)
class StepPlan:
    """The run as a function of the step, counted from 0.

    `mix` accumulate: every step holds `accumulate` micro-batches of each modality, weighed by
    `image_share`. `mix` alternate: a step is all video or all image, images every 1 / image_share
    steps; the same on average (docs/method.md section 6, images and videos together).
    `context_weights` are lambda's full values.
    """

    steps: int
    accumulate: int
    mix: Literal["accumulate", "alternate"]
    image_share: float
    context_weights: Mapping[Modality, float]
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

    def draws(self, step: int) -> list[Draw]:
        """The micro-batches of a step, in order; their shares add up to 1."""
        shares: dict[Modality, float] = {
            "video": 1.0 - self.image_share,
            "image": self.image_share,
        }
        if self.mix == "alternate":
            image = self._images_before(step + 1) > self._images_before(step)
            shares = {"video": float(not image), "image": float(image)}
        return [
            Draw(modality, share / self.accumulate)
            for modality, share in shares.items()
            if share
            for _ in range(self.accumulate)
        ]

    def position(self, step: int, modality: Modality) -> int:
        """Micro-batches of a modality that the steps before `step` have used."""
        if self.mix == "accumulate":
            used = (
                step if (self.image_share if modality == "image" else 1 - self.image_share) else 0
            )
        else:
            images = self._images_before(step)
            used = images if modality == "image" else step - images
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

    def context_weight(self, step: int, modality: Modality) -> float:
        return context_weight(step, self.context_weights[modality], self.ramp)

    def _images_before(self, step: int) -> int:
        # A hair above, so that a share such as 0.1 counts ten steps as one image step.
        return floor(step * self.image_share + 1e-9)
