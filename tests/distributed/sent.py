"""Bytes that a rank sends, counted where the process group is called, as a ring would send them."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Sent(TorchDispatchMode):
    """Counts while it is entered: `gradients` in reductions, `weights` in gathers."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self._ring = (ranks - 1) / ranks
        self.gradients = self.weights = 0.0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = str(func).removesuffix(".default")
        if name == "c10d.allreduce_":
            self.gradients += 2 * self._ring * sum(_bytes(tensor) for tensor in args[0])
        elif name == "c10d._reduce_scatter_base_":
            self.gradients += self._ring * _bytes(args[1])
        elif name == "c10d._allgather_base_":
            self.weights += self._ring * _bytes(args[0])
        return func(*args, **(kwargs or {}))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
