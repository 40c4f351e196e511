"""Operations that a call hands to its device, and the bytes they read and write.

    with Traffic() as traffic:
        step()
    traffic.operations, traffic.bytes

Counted where PyTorch dispatches: an operation is one that is neither a view nor an allocation, its
bytes are those of its tensors in and out. One of our ops, or of the passes between a block's
products, counts as one, whatever it launches. What
caches save is not known here, and what a view repeats counts once.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastjepa_kernels.library import watchers

_NO_WORK = frozenset(
    f"aten::{name}"
    for name in (
        "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach",
        "lift_fresh", "_local_scalar_dense", "resize_", "set_",
    )
)  # fmt: skip


class Traffic(TorchDispatchMode):
    """Counts while it is entered; see the file's head."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0
        self.bytes = 0

    def __enter__(self) -> "Traffic":
        watchers.append(self._count)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        watchers.remove(self._count)

    def _count(self, given: Any, written: Any) -> None:
        self.operations += 1
        self.bytes += _bytes(tree_leaves(given)) + _bytes(tree_leaves(written))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        schema = func._schema
        if not func.is_view and schema.name not in _NO_WORK:
            written = out
            if not schema.returns:
                written = [
                    value
                    for value, argument in zip(args, schema.arguments, strict=False)
                    if argument.alias_info is not None and argument.alias_info.is_write
                ]
            self._count((args, kwargs), written)
        return out


def _bytes(values: Iterable[object]) -> int:
    """Of the different tensors among them; a dimension that a view repeats counts once."""
    tensors = {id(v): v for v in values if isinstance(v, Tensor) and v.layout == torch.strided}
    return sum(_elements(tensor) * tensor.element_size() for tensor in tensors.values())


def _elements(value: Tensor) -> int:
    sizes = zip(value.shape, value.stride(), strict=True)
    count = 1
    for size, stride in sizes:
        count *= size if stride or not size else 1
    return count
