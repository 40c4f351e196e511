"""A step's report and a probe's features as metrics: the names that logs, charts and warnings
share."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastjepa.objective.health import effective_rank, feature_norm, feature_std, target_drift
from fastjepa.train.engine import Engine
from fastjepa.train.plan import Draw
from fastjepa.train.ranks import Ranks
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


def on_host(metrics: Mapping[str, Tensor | float], ranks: Ranks) -> dict[str, float]:
    """All values as floats, tensors as the ranks' means, waiting for the device once."""
    tensors = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
    stacked = torch.stack([t.detach().double() for t in tensors.values()])
    values = ranks.mean(stacked).tolist()
    plain = {name: float(v) for name, v in metrics.items() if not isinstance(v, Tensor)}
    return plain | dict(zip(tensors, values, strict=True))
