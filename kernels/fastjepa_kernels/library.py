"""Registration of the ops with PyTorch, under this package's own import name.

A copy of the package under another name registers ops of its own: nothing collides.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch._library.custom_ops import CustomOpDef

NAMESPACE = __name__.rpartition(".")[0].replace(".", "_")


def custom_op(
    name: str, *, mutates: Sequence[str] = ()
) -> Callable[[Callable[..., object]], "CustomOpDef"]:
    """Register a function as the op `NAMESPACE::name`; its schema comes from its annotations."""
    return torch.library.custom_op(f"{NAMESPACE}::{name}", mutates_args=tuple(mutates))
