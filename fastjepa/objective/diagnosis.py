"""What a run's logged metrics say about its health, in words.

Pure: rows of metrics.jsonl in, warnings out. health.py makes the numbers;
docs/reading-the-curves.md says what is normal and what to do.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, nan
from statistics import median


@dataclass(frozen=True)
class Thresholds:
    """When `diagnose` speaks. Counts are logged steps; shares are between medians of `recent` ones.

    They are chosen to stay silent on ordinary runs, not measured on a set of failed ones. Raises
    ValueError unless 1 <= recent < window.
    """

    recent: int = 5
    window: int = 30
    std_share: float = 0.25
    rank_share: float = 0.1
    rank_floor: float = 2.0
    target_std_floor: float = 0.01
    drop_share: float = 0.7
    gradient_factor: float = 10.0
    drift_floor: float = 1e-7

    def __post_init__(self) -> None:
        if not 1 <= self.recent < self.window:
            raise ValueError(
                f"thresholds: expected 1 <= recent < window, got recent {self.recent} and "
                f"window {self.window}"
            )


DEFAULT_THRESHOLDS = Thresholds()
History = Sequence[Mapping[str, float]]


def diagnose(metrics_history: History, thresholds: Thresholds = DEFAULT_THRESHOLDS) -> list[str]:
    """What is wrong at the end of a run's logged metrics (oldest first), a sentence each.

    Only logged steps of the last one's streams (its `loss/STREAM`, as steps that alternate have)
    are compared, and a metric that is missing is not judged. Nothing is compared before twice
    `recent` logged steps, and partial collapse, which early learning resembles, not before twice
    `window`.
    """
    return list(_findings(metrics_history, thresholds).values())


class HealthWatch:
    """`diagnose` along a run in bounded memory: a warning once, and again after it had gone.

    A resumed run feeds it the rows of its metrics.jsonl first, so that the start stays the start.
    """

    def __init__(self, thresholds: Thresholds = DEFAULT_THRESHOLDS) -> None:
        self._thresholds = thresholds
        self._first: dict[frozenset[str], list[dict[str, float]]] = {}
        self._last: dict[frozenset[str], deque[dict[str, float]]] = {}
        self._standing: dict[frozenset[str], set[str]] = {}

    def update(self, metrics: Mapping[str, float]) -> list[str]:
        """Take one logged step; return the warnings that are new with it."""
        streams = _streams(metrics)
        first = self._first.setdefault(streams, [])
        last = self._last.setdefault(streams, deque(maxlen=2 * self._thresholds.window))
        if len(first) < self._thresholds.recent:
            first.append(dict(metrics))
        else:
            last.append(dict(metrics))
        found = _findings([*first, *last], self._thresholds)
        standing = self._standing.get(streams, set())
        self._standing[streams] = set(found)
        return [words for key, words in found.items() if key not in standing]


def _findings(history: History, limits: Thresholds) -> dict[str, str]:
    """Warnings under a key that stays the same while a condition lasts."""
    if not history:
        return {}
    streams = _streams(history[-1])
    alike = [row for row in history if _streams(row) == streams]
    found = _not_finite(alike[-1])
    if len(alike) < 2 * limits.recent:
        return found
    start = alike[: limits.recent]
    window = alike[-limits.window :]
    before, now = window[: -limits.recent], window[-limits.recent :]
    found |= _collapse(start, now, limits)
    # Early on an untrained encoder's noise goes out of the features: both fall, and all is well.
    if len(alike) >= 2 * limits.window:
        found |= _partial_collapse(before, now, limits)
    found |= _exploding(before, now, limits)
    found |= _dead_target(now, limits)
    return found


def _not_finite(row: Mapping[str, float]) -> dict[str, str]:
    bad = [key for key in ("loss", "grad_norm") if not isfinite(row.get(key, 0.0))]
    if not bad:
        return {}
    return {
        "not finite": f"{' and '.join(bad)} at step {row['step']:.0f} is not a finite number: "
        "lower the lr, lengthen the warm-up or set optim.clip, and go on from an earlier checkpoint"
    }


def _collapse(start: History, now: History, limits: Thresholds) -> dict[str, str]:
    found = {}
    for key in _levels(now, "feature_std"):
        first, last = _median(start, key), _median(now, key)
        if last < limits.std_share * first:
            found[key] = (
                f"feature std of {_place(key)} fell to {last / first:.0%} of its start: the "
                "features collapse; raise the EMA momentum or lower the lr"
            )
    for key in _levels(now, "effective_rank"):
        first, last = _median(start, key), _median(now, key)
        if last < limits.rank_floor:
            found[key] = (
                f"effective rank of {_place(key)} is {last:.1f}: all features lie along one "
                "direction, a collapse; start again with a higher EMA momentum or a lower lr"
            )
        elif last < limits.rank_share * first:
            found[key] = (
                f"effective rank of {_place(key)} fell to {last:.0f} from {first:.0f} at the "
                "start: the features use ever fewer directions; raise the EMA momentum or lower "
                "the lr"
            )
    for key in _levels(now, "target_std"):
        last = _median(now, key)
        if last < limits.target_std_floor:
            found[key] = (
                f"target std of {_place(key)} is {last:.2g}: every token has the same target, so "
                "there is nothing to predict; start again with a higher EMA momentum or a lower lr"
            )
    return found


def _partial_collapse(before: History, now: History, limits: Thresholds) -> dict[str, str]:
    losses = ("loss_predict", "loss")
    key = next((name for name in losses if _known(before, name) and _known(now, name)), None)
    if key is None or _median(now, key) > limits.drop_share * _median(before, key):
        return {}
    fallen = [
        name
        for name in _levels(now, "effective_rank")
        if _known(before, name) and _median(now, name) < limits.drop_share * _median(before, name)
    ]
    if not fallen:
        return {}
    share = _median(now, key) / _median(before, key)
    return {
        "partial collapse": f"the loss dropped to {share:.0%} while the effective rank of "
        f"{', '.join(map(_place, fallen))} fell: a partial collapse, not progress; go on from a "
        "checkpoint before the drop with a higher EMA momentum or a lower lr"
    }


def _exploding(before: History, now: History, limits: Thresholds) -> dict[str, str]:
    def growth(key: str) -> float:
        return _median(now, key) / max(_median(before, key), 1e-30)

    if not (_known(before, "grad_norm") and _known(now, "grad_norm")):
        return {}
    if growth("grad_norm") < limits.gradient_factor:
        return {}
    parts = [key for key in _levels(now, "grad_norm") if _known(before, key)]
    where = f", most in {_part(max(parts, key=growth))}" if parts else ""
    return {
        "gradients": f"gradients grew {growth('grad_norm'):.0f} times within the last logged steps"
        f"{where}: lower the lr, lengthen the warm-up or set optim.clip"
    }


def _dead_target(now: History, limits: Thresholds) -> dict[str, str]:
    learning = all(row.get("lr", 0.0) > 0.0 and row.get("ema_momentum", 1.0) < 1.0 for row in now)
    if not learning or not all("target_drift" in row for row in now):
        return {}
    if max(row["target_drift"] for row in now) > limits.drift_floor:
        return {}
    return {
        "dead target": f"the target has not moved for {len(now)} logged steps although its EMA "
        f"momentum is {now[-1]['ema_momentum']:g}: the EMA update does not reach it (is it kept in "
        "bf16, or is every step skipped?)"
    }


def _streams(row: Mapping[str, float]) -> frozenset[str]:
    return frozenset(key for key in row if key.startswith("loss/"))


def _levels(rows: History, metric: str) -> list[str]:
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith(f"{metric}/"))
    return [key for key in keys if _known(rows, key)]


def _finite(rows: History, key: str) -> list[float]:
    return [row[key] for row in rows if isfinite(row.get(key, nan))]


def _known(rows: History, key: str) -> bool:
    return bool(_finite(rows, key))


def _median(rows: History, key: str) -> float:
    """NaN, which no comparison holds for, when no row has a finite value."""
    return median(_finite(rows, key) or [nan])


def _place(key: str) -> str:
    return key.split("/", 1)[1].replace("level", "level ")


def _part(key: str) -> str:
    return key.split("/", 1)[1].replace("_", " ")
