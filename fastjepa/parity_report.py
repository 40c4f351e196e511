"""What a comparison with a golden file found: errors by family, and what was left out."""

from dataclasses import dataclass
from math import inf
from pathlib import Path

from torch import Tensor

from fastjepa.golden import GoldenStep

FAMILIES = (
    "inputs", "targets", "context features", "predictions", "distance weights", "loss_pred",
    "loss_context", "loss_context_unweighted", "loss", "gradients", "AdamW", "EMA",
    "inference features",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """The `count` tensors of one kind: the largest relative error among them, and whose it is."""

    name: str
    count: int
    error: float
    tensor: str


@dataclass(frozen=True)
class Report:
    """Outcome of a comparison.

    `uncompared`: tensors of the file that nothing was compared with, which fail it. `unused`:
    weights no result of this step depends on (the image tokenizer of a video step), of which only
    names, shapes and finiteness can be checked.
    """

    path: Path
    tolerance: float
    families: tuple[Family, ...]
    uncompared: tuple[str, ...]
    unused: tuple[str, ...]
    ties: int

    @property
    def passed(self) -> bool:
        return not self.uncompared and all(f.error <= self.tolerance for f in self.families)

    def lines(self) -> list[str]:
        """The report as plain lines: families, what was left out, the verdict."""
        table = [
            f"{f.name:<24} {f.error:8.1e}  {f.count:4d} tensors"
            + (f", worst {f.tensor}" if f.error else "")
            + ("" if f.error <= self.tolerance else f"  ABOVE {self.tolerance:g}")
            for f in self.families
        ]
        if self.uncompared:
            table.append(f"not compared: {', '.join(self.uncompared)}")
        if self.unused:
            table.append(f"no result depends on {len(self.unused)}: {', '.join(self.unused)}")
        if self.ties:
            table.append(f"predictions on their target, signs as recorded: {self.ties}")
        return [*table, f"{self.path}: {'passed' if self.passed else 'FAILED'}"]


class Ledger:
    """Compares results with the file's tensors and remembers which of them had their turn."""

    def __init__(self, golden: GoldenStep) -> None:
        self.golden = golden
        self.errors: dict[str, dict[str, float]] = {name: {} for name in FAMILIES}

    def compare(self, family: str, name: str, ours: Tensor) -> None:
        """Compare with the file's tensor `name`; sides of 1 may be missing in either."""
        recorded = self.golden[name]
        if _sides(ours) != _sides(recorded):
            raise ValueError(
                f"{self.golden.path}: {name}: expected shape {list(ours.shape)}, "
                f"found {list(recorded.shape)}"
            )
        self.errors[family][name] = _relative_error(ours.detach().flatten(), recorded.flatten())

    def note(self, family: str, name: str, *, fits: bool) -> None:
        """A comparison without degrees: no error, or an infinite one."""
        self.errors[family][name] = 0.0 if fits else inf

    def report(self, tolerance: float, *, unused: tuple[str, ...], ties: int) -> Report:
        """Sum up; tensors of the file that were not compared are listed."""
        families = []
        for name, errors in self.errors.items():
            if errors:
                worst = max(errors, key=lambda tensor: errors[tensor])
                families.append(Family(name, len(errors), errors[worst], worst))
        compared = {tensor for errors in self.errors.values() for tensor in errors}
        uncompared = tuple(name for name in self.golden.tensors if name not in compared)
        return Report(self.golden.path, tolerance, tuple(families), uncompared, unused, ties)


def _sides(tensor: Tensor) -> list[int]:
    return [side for side in tensor.shape if side != 1]


def _relative_error(ours: Tensor, recorded: Tensor) -> float:
    if not (ours.isfinite().all() and recorded.isfinite().all()):
        return inf
    scale = float(recorded.abs().max())
    error = float((ours.to(recorded.dtype) - recorded).abs().max())
    return error / scale if scale else error
