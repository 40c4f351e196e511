"""What a measured op has to provide: inputs at a shape, the ways to compute it, and its least work.

A way's `run()` is the forward without a graph, or, where the case has leaves, forward and backward
to them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastjepa.bench.official import Official
from fastjepa.bench.shapes import Shape

Forward = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Work:
    """What no implementation can do without: bytes read and written once, and, where products
    bound the time, floating-point operations."""

    bytes: int
    flops: int = 0


class Case(ABC):
    """One op on fresh random inputs at a shape; the same for the same seed."""

    name: ClassVar[str]
    measures: ClassVar[str]
    # Inputs with a gradient, and the gradient that the outputs, one behind another, receive (none
    # for a scalar loss).
    leaves: Sequence[Tensor] = ()
    upstream: Tensor | None = None

    def __init__(self, shape: Shape, device: torch.device, seed: int = 0) -> None:
        self.shape, self.device = shape, device
        self.random = torch.Generator(device).manual_seed(seed)
        self.prepare()

    @staticmethod
    @abstractmethod
    def work(shape: Shape) -> Work:
        """The least work, from the shape's numbers alone."""

    @abstractmethod
    def prepare(self) -> None:
        """Make the inputs."""

    @abstractmethod
    def ours(self) -> list[Tensor]:
        """The op as its users call it."""

    @staticmethod
    @abstractmethod
    def formula(*arguments: Any) -> list[Tensor]:
        """The plain formula, a function of `arguments()` alone so that it can be compiled."""

    @abstractmethod
    def arguments(self) -> tuple[Any, ...]:
        """The formula's arguments."""

    @abstractmethod
    def official(self, official: Official) -> list[Tensor]:
        """The official order of operations."""

    def others(self) -> dict[str, Forward]:
        """Further ways worth a comparison, by name."""
        return {}

    def comparable(self, way: str, outputs: list[Tensor]) -> Tensor:
        """Outputs as one tensor whose order does not depend on the way."""
        return torch.cat([output.flatten() for output in outputs])

    def normal(self, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(sizes, dtype=dtype, device=self.device, generator=self.random)

    def run(self, forward: Forward) -> list[Tensor]:
        """Results of the forward, or gradients of the leaves."""
        if not self.leaves:
            with torch.no_grad():
                return forward()
        outputs = forward()
        grads = None
        if self.upstream is not None:
            parts = self.upstream.split([output.numel() for output in outputs])
            grads = [g.view(output.shape) for g, output in zip(parts, outputs, strict=True)]
        return list(torch.autograd.grad(outputs, list(self.leaves), grads))


def leaf(x: Tensor) -> Tensor:
    return x.requires_grad_()
