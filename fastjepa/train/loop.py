"""The run around the step: data in, metrics and checkpoints out, from the first step or from a
checkpoint.

Resuming needs only the step: the plan gives the place in the data, the loaders start there.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from fastjepa.checkpoint.layout import remove_newer
from fastjepa.data.augment import normalise
from fastjepa.data.batch import Batch, BatchSource
from fastjepa.data.quarantine import BadFile, Quarantine, TooManyBadFiles
from fastjepa.masking.batch import Masks
from fastjepa.objective.diagnosis import HealthWatch
from fastjepa.observe.console import Console
from fastjepa.observe.memory import read_memory
from fastjepa.observe.profile import StepProfile
from fastjepa.observe.sinks import Sinks, read_metrics
from fastjepa.observe.stages import named
from fastjepa.observe.throughput import Throughput
from fastjepa.train.engine import Engine
from fastjepa.train.guard import LossGuard
from fastjepa.train.plan import StepPlan
from fastjepa.train.ranks import RanksError
from fastjepa.train.report import (
    Probe,
    Told,
    on_host,
    over_ranks,
    step_metrics,
    stream_losses,
)
from fastjepa.train.returns import DivergedError, Returns
from fastjepa.train.saver import Saver
from fastjepa.train.signals import StopRequest
from fastjepa.train.state import restore, save
from fastjepa.train.step import Jepa, MicroBatch, StepReport, train_step
from fastjepa.train.work import Work


class Evaluation(Protocol):
    """What a run measures beside its training, after every `every` steps and on all ranks."""

    every: int

    def __call__(self, trainer: "Trainer", /) -> tuple[dict[str, float], Image.Image]:
        """Metrics for the log, and a picture. It leaves data and random generators alone."""


class RunStoppedError(RanksError):
    """The run cannot go on: too many skipped steps in a row."""


@dataclass
class Trainer:
    """Everything a run needs, wired by build.py; `run` goes from `step` to the plan's end.

    On many ranks each has its own, with loaders of its share of the samples: they stop after the
    same step, meet the same bad files, and the first one writes. `tokens` names every stream that
    any rank takes, `loaders` this rank's.
    """

    jepa: Jepa
    engine: Engine
    guard: LossGuard
    plan: StepPlan
    loaders: Mapping[str, BatchSource]
    quarantine: Quarantine
    tokens: Mapping[str, int]
    work: Work
    folder: Path
    facts: dict[str, Any]
    console: Console
    log_every: int
    checkpoint_every: int
    saver: Saver
    max_skips: int
    returns: Returns
    packed: bool = False
    step: int = 0
    wandb_project: str | None = None
    evaluation: Evaluation | None = None
    profile: StepProfile | None = None
    _bad: list[BadFile] = field(default_factory=list)

    def run(self, stop: StopRequest) -> bool:
        """Train until the plan's end (True) or until a signal asks any rank to stop (False), saved
        either way.

        Raises TooManyBadFiles, WorkerDiedError, CheckpointError, or RunStoppedError; the last
        checkpoint stands then.
        """
        while True:
            try:
                return self._run(stop)
            except DivergedError as diverged:
                self._go_back(diverged)

    def _run(self, stop: StopRequest) -> bool:
        """`run`, until it has to go back."""
        watch = self._health_so_far()
        probe = Probe(self.jepa, self.engine, normalise(self.probe_clip(next(iter(self.loaders)))))
        meter = Throughput()
        batches = {
            stream: loader.batches(
                self.plan.position(self.returns.data_step(self.step), stream),
                self.plan.position(self.returns.data_step(self.plan.steps), stream),
            )
            for stream, loader in self.loaders.items()
        }
        saved = self.step
        with ExitStack() as stack:
            sinks = None
            if self.engine.ranks.first:
                opened = Sinks.open(self.folder, self.step, wandb_project=self.wandb_project)
                sinks = stack.enter_context(opened)
            self.console.start(self.plan.steps, self.step)
            try:
                while self.step < self.plan.steps and not self._asked_to_stop(stop):
                    evaluated = self._is_evaluated(self.step + 1)
                    logged = (self.step + 1) % self.log_every == 0 or self.step == 0 or evaluated
                    if self.profile is not None:
                        self.profile.before(self.step + 1)
                    report = self._train_step(batches, meter, logged)
                    self.step += 1
                    if self.profile is not None:
                        with meter.paused():
                            self._told_of(self.profile.after(self.step))
                    self._share_bad_files()
                    if logged or self.step == self.plan.steps:
                        metrics = self._metrics(report, probe, meter)
                        if evaluated:
                            metrics |= self._evaluate(sinks, meter)
                        if sinks is not None:
                            sinks.write(metrics)
                        self.console.update(metrics)
                        for warning in watch.update(metrics):
                            self.console.warn(warning)
                        self._check_skips(metrics)
                    else:
                        self.console.update({"step": self.step})
                    self.saver.poll()
                    if self.step % self.checkpoint_every == 0:
                        with meter.paused():
                            self.save()
                        saved = self.step
            finally:
                if self.profile is not None:
                    self._told_of(self.profile.close())
                self.console.close()
                for loader in self.loaders.values():
                    loader.close()
                if (error := sys.exc_info()[1]) is not None:
                    self.saver.abandon(error)
            if saved != self.step:
                self.save()
            self.saver.wait()
        return self.step == self.plan.steps

    def _is_evaluated(self, step: int) -> bool:
        return self.evaluation is not None and step % self.evaluation.every == 0

    def _evaluate(self, sinks: Sinks | None, meter: Throughput) -> dict[str, float]:
        assert self.evaluation is not None
        with meter.paused():
            metrics, picture = self.evaluation(self)
            if sinks is not None:
                sinks.picture("features", picture, self.step)
        return metrics

    def save(self) -> None:
        """Begin a checkpoint of the present step."""
        facts = self.facts | self.returns.state()
        save(self.saver, self.step, self.engine, self.guard, facts)

    def probe_clip(self, stream: str) -> torch.Tensor:
        """The fixed clip that health and pictures are taken on: uint8 [1, 3, T, H, W]."""
        return self._noted(self.loaders[stream].first_clip).clip.to(self.engine.device)

    def probe_clips(self) -> list[torch.Tensor]:
        """That of each stream which any rank takes, the same on all ranks, which all call it."""
        ranks = self.engine.ranks
        # Where ranks take other streams, the first and the last have all of them between them.
        tells = ranks.rank in (0, ranks.size - 1)
        own = {name: self.probe_clip(name).cpu() for name in self.loaders if tells}
        found: dict[str, torch.Tensor] = {}
        for told in ranks.gather(own):
            found = told | found
        return [found[name].to(self.engine.device) for name in self.tokens]

    def _train_step(
        self, batches: Mapping[str, Iterator[Batch]], meter: Throughput, norms: bool
    ) -> StepReport:
        clips = tokens = flops = 0

        def micro_batches() -> Iterator[MicroBatch]:
            nonlocal clips, tokens, flops
            draws = self.plan.draws(self.returns.data_step(self.step))
            for number, draw in enumerate(draws, start=1):
                with meter.waiting(), named("data wait"):
                    batch = self._noted(partial(next, batches[draw.stream]))
                assert isinstance(batch.extras, Masks)
                clips += len(batch.clip)
                tokens += len(batch.clip) * self.tokens[draw.stream]
                flops += self.work.flops(
                    batch.extras, clips=len(batch.clip), tokens=self.tokens[draw.stream],
                    image=draw.stream == "image",
                )  # fmt: skip
                device = self.engine.device
                yield MicroBatch(
                    clip=normalise(batch.clip.to(device, non_blocking=True)),
                    masks=batch.extras.to(device),
                    share=draw.share,
                    context_weight=self.plan.context_weight(self.step, draw.stream),
                    last=number == len(draws),
                )

        report = train_step(
            self.jepa, self.engine, self.guard, micro_batches(),
            step=self.step, lr=self.plan.lr(self.step), weight_decay=self.plan.decay(self.step),
            momentum=self.plan.momentum(self.step), norms_by_part=norms, packed=self.packed,
        )  # fmt: skip
        meter.step(clips=clips, tokens=tokens, flops=flops)
        return report

    def _asked_to_stop(self, stop: StopRequest) -> bool:
        """Whether a signal has come to any rank; `stop` then names it on all of them."""
        ranks = self.engine.ranks
        asked = ranks.any_on_host(stop.name is not None)
        if asked:
            stop.name = next(name for name in ranks.gather(stop.name) if name is not None)
        return asked

    def _noted(self, make: Callable[[], Batch]) -> Batch:
        """A batch, its bad files noted, also when there were too many to make one."""
        try:
            batch = make()
        except TooManyBadFiles as error:
            self._quarantine(error.bad)
            raise
        if self.engine.ranks.size == 1:
            self._quarantine(batch.bad)
        else:
            self._bad += batch.bad
        return batch

    def _share_bad_files(self) -> None:
        """Put what any rank met into everyone's quarantine, so that all stop at too many."""
        ranks = self.engine.ranks
        if ranks.any_on_host(bool(self._bad)):
            for bad in ranks.gather(self._bad):
                self._quarantine(bad)
            self._bad = []

    def _quarantine(self, bad: list[BadFile]) -> None:
        for path, reason in self.quarantine.add(bad):
            self.console.warn(f"skipped {path}: {reason} ({len(self.quarantine)} bad so far)")

    def _told_of(self, trace: Path | None) -> None:
        if trace is not None:
            self.console.say(f"{trace}: Chrome trace of this rank; ui.perfetto.dev shows it")

    def _metrics(self, report: StepReport, probe: Probe, meter: Throughput) -> dict[str, float]:
        done = self.step - 1
        draws = self.plan.draws(self.returns.data_step(done))
        found = step_metrics(report, self.jepa.levels, [draw.share for draw in draws])
        if len(self.tokens) > 1:
            found |= stream_losses(report, draws)
        found |= probe.metrics() | {"skipped": self.guard.skipped}
        found["ema_distance"] = self.engine.ema_distance()
        total = sum(draw.share for draw in draws)
        weight = sum(d.share * self.plan.context_weight(done, d.stream) for d in draws) / total
        found |= {
            "context_weight": weight,
            "image_share": sum(d.share for d in draws if d.stream == "image") / total,
        }
        memory = read_memory(self.engine.device).main
        told = Told(total, on_host(found), meter.read(), memory, self.work.peak)
        return over_ranks(self.engine.ranks.gather(told)) | {
            "step": self.step,
            "lr": self.plan.lr(done),
            "weight_decay": self.plan.decay(done),
            "ema_momentum": self.plan.momentum(done),
            **self.returns.metrics(),
        }

    def _check_skips(self, metrics: Mapping[str, float]) -> None:
        in_a_row = int(self.guard.skipped_in_a_row)
        if self.returns.asked_for(in_a_row):
            self.saver.wait()
            found = self.returns.target(self.folder, self.step - in_a_row)
            path = self.engine.ranks.gather(found)[0]
            if path is not None:
                raise DivergedError(path, in_a_row)
        if in_a_row > self.max_skips:
            raise RunStoppedError(
                f"step {self.step}: {in_a_row} steps in a row were skipped (guard.max_skips "
                f"{self.max_skips}); the last loss was {metrics['loss']:g}; a lower optim.lr or "
                "optim.clip may help"
            )

    def _go_back(self, diverged: DivergedError) -> None:
        """Load an older checkpoint, leave out the data taken since, and save that it was."""
        at, ranks = self.step, self.engine.ranks
        self.step = restore(diverged.path, self.engine, self.guard).step
        self.returns.note(at, self.step)
        self.console.warn(
            f"step {at}: {diverged.skipped} steps in a row were skipped; back to step {self.step}, "
            f"leaving out the data of {at - self.step} steps (return {len(self.returns.made)} of "
            f"{self.returns.most}, guard.max_returns)"
        )
        if ranks.first:
            remove_newer(diverged.path)
        ranks.gather(None)
        self.save()
        self.saver.wait()

    def _health_so_far(self) -> HealthWatch:
        """A watch that has seen the logged steps of the run so far."""
        watch = HealthWatch()
        path = self.folder / "metrics.jsonl"
        if path.exists():
            for row in read_metrics(path):
                if row["step"] <= self.step:
                    watch.update(row)
        return watch
