"""Our training step behind the same call as the official one's (official_step.py)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

from fastjepa.bench.official_step import Update
from fastjepa.masking.batch import Masks, distance_weights
from fastjepa.model.block import blocks_of
from fastjepa.observe.stages import stage
from fastjepa.train.engine import Engine
from fastjepa.train.guard import LossGuard
from fastjepa.train.step import Jepa, MicroBatch, train_step


class OurStep:
    """One step of `jepa` on `engine`, told what `update` says."""

    def __init__(self, jepa: Jepa, engine: Engine, update: Update) -> None:
        self.jepa, self.engine, self.update = jepa, engine, update
        self.guard = LossGuard(sigma=None, window=300, start=0, device=engine.device)

    def __call__(self, clip: Tensor, masks: Masks) -> float:
        """One step on a normalised clip [B, 3, T, H, W], and its loss.

        Distance weights are made in it, as theirs are; in training the data workers make ours.
        """
        with stage("loss"):
            pairs = zip(masks.context, masks.predict, strict=True)
            grid, offset = self.jepa.encoder.grid(clip), self.update.offset
            weights = tuple(distance_weights(c, p, grid, offset=offset) for c, p in pairs)
        batch = MicroBatch(clip, replace(masks, weights=weights), 1.0, self.update.context_weight)
        report = train_step(
            self.jepa, self.engine, self.guard, [batch], step=0, lr=self.update.lr,
            weight_decay=self.update.weight_decay, momentum=self.update.momentum,
        )  # fmt: skip
        return float(report.loss)


@contextmanager
def as_on_a_gpu(step: Callable[[Tensor, Masks], float]) -> Iterator[None]:
    """Inside, our blocks on a CPU run the operations that they run on a GPU, to be counted; mask
    groups are packed as there. A step that is not ours is left alone."""
    if not isinstance(step, OurStep):
        yield
        return
    blocks = blocks_of(step.jepa.encoder, step.jepa.target, step.jepa.predictor)
    by_hand, in_turn = [block.by_hand for block in blocks], step.engine.in_turn
    step.engine.in_turn = False
    for block in blocks:
        block.by_hand = "gpu"
    yield
    step.engine.in_turn = in_turn
    for block, was in zip(blocks, by_hand, strict=True):
        block.by_hand = was
