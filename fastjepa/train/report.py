"""A step's report and a probe's features as metrics: the names that logs, charts and warnings
share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastjepa.objective.health import effective_rank, feature_norm, feature_std, target_drift
from fastjepa.train.engine import Engine
from fastjepa.train.plan import Draw
from fastjepa.train.step import Jepa, StepReport


def step_metrics(
    report: StepReport, levels: Sequence[int], shares: Sequence[float]
) -> dict[str, Tensor | float]:
    """Losses of a step, in total, by term and by level: micro-batches weighed by their shares."""
    metrics: dict[str, Tensor | float] = {"loss": report.loss, "grad_norm": report.grad_norm}
    metrics |= report.grad_norms
    for name in ("predict", "context"):
        found = [
            (share, getattr(term, name), getattr(term, f"{name}_terms"))
            for share, term in zip(shares, report.terms, strict=True)
            if getattr(term, name) is not None
        ]
        total = sum(share for share, _, _ in found)
        if not found:
            continue
        metrics[f"loss_{name}"] = torch.stack([s * t.detach() for s, t, _ in found]).sum() / total
        by_level = torch.stack([s * terms.mean(0) for s, _, terms in found]).sum(0) / total
        metrics |= {
            f"loss_{name}/level{level}": value
            for level, value in zip(levels, by_level.unbind(), strict=True)
        }
    return metrics


def stream_losses(report: StepReport, draws: Sequence[Draw]) -> dict[str, Tensor]:
    """Loss of each stream that the step held, the mean of its micro-batches: `loss/video`, ..."""
    losses: dict[str, list[Tensor]] = {}
    for draw, term in zip(draws, report.terms, strict=True):
        losses.setdefault(f"loss/{draw.stream}", []).append(term.total.detach())
    return {name: torch.stack(found).mean() for name, found in losses.items()}


class Probe:
    """Health of the features of one fixed clip, measured the same way along the whole run."""

    def __init__(self, jepa: Jepa, engine: Engine, clip: Tensor) -> None:
        """clip: normalised [1, 3, T, H, W] on the run's device."""
        self._jepa, self._engine, self._clip = jepa, engine, clip
        self._targets = self._levels()[1][-1]

    def metrics(self) -> dict[str, Tensor]:
        """Std of context and target features by level, norm of the targets, rank of the last level,
        and drift since the last call unless a frozen teacher gives the targets."""
        features, targets = self._levels()
        found = {
            f"feature_std/level{level}": feature_std(x)
            for level, x in zip(self._jepa.levels, features, strict=True)
        }
        for level, x in zip(self._jepa.target_levels, targets, strict=True):
            found[f"target_std/level{level}"] = feature_std(x)
            found[f"target_norm/level{level}"] = feature_norm(x)
        found[f"effective_rank/level{self._jepa.levels[-1]}"] = effective_rank(features[-1])
        if self._jepa.teacher is None:
            found["target_drift"] = target_drift(targets[-1], self._targets)
            self._targets = targets[-1]
        return found

    def _levels(self) -> tuple[list[Tensor], list[Tensor]]:
        """Those of the context encoder and of the target."""
        found: list[list[Tensor]] = []

        def run() -> None:
            found.append(self._jepa.source(self._clip, levels=self._jepa.target_levels))
            found.append(self._jepa.encoder(self._clip, levels=self._jepa.levels))

        self._engine.measure(run)
        targets, features = found
        return features, targets


@dataclass(frozen=True)
class Told:
    """What a rank tells of a logged step: `metrics` are means over the ranks by its loss's
    `weight`, `rates` those of its meter, `memory` its high-water mark in GiB, `peak` its device's
    operations a second."""

    weight: float
    metrics: Mapping[str, float]
    rates: Mapping[str, float]
    memory: float
    peak: float | None


def over_ranks(told: Sequence[Told]) -> dict[str, float]:
    """One row of metrics: a metric is the mean over the ranks that have it (image ranks have no
    loss of videos), rates are sums, and of waits and memory the largest counts."""
    found: dict[str, float] = {}
    for name in {name: None for one in told for name in one.metrics}:
        have = [(one.weight, one.metrics[name]) for one in told if name in one.metrics]
        found[name] = sum(w * value for w, value in have) / sum(w for w, _ in have)
    rates = [one.rates for one in told]
    if all(rates):
        found |= {
            name: sum(rate[name] for rate in rates)
            for name in ("clips_per_second", "tokens_per_second", "flops_per_second")
        }
        # Every rank waits for the one that waits longest for its data.
        waits, flops = ([rate[name] for rate in rates] for name in ("data_wait", "step_flops"))
        found |= {"step_seconds": max(r["step_seconds"] for r in rates), "data_wait": max(waits)}
        peaks = [one.peak for one in told if one.peak is not None]
        if len(peaks) == len(told):
            found["mfu"] = found["flops_per_second"] / sum(peaks)
        if len(told) > 1:
            found["slowest_rank"] = waits.index(max(waits))
            found["work_spread"] = max(flops) / min(flops) - 1.0
    return found | {"memory_gib": max(one.memory for one in told)}


def on_host(metrics: Mapping[str, Tensor | float]) -> dict[str, float]:
    """All values as floats, waiting for the device once."""
    tensors = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
    stacked = torch.stack([t.detach().double() for t in tensors.values()])
    plain = {name: float(v) for name, v in metrics.items() if not isinstance(v, Tensor)}
    return plain | dict(zip(tensors, stacked.tolist(), strict=True))
