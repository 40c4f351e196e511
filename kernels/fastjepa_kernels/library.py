"""Registration of the ops with PyTorch, under this package's own import name.

A copy of the package under another name registers ops of its own: nothing collides.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch._library.custom_ops import CustomOpDef

Function = TypeVar("Function", bound=Callable[..., Any])

NAMESPACE = __name__.rpartition(".")[0].replace(".", "_")


def custom_op(
    name: str, *, mutates: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], "CustomOpDef"]:
    """Register a function as the op `NAMESPACE::name`; its schema comes from its annotations.

    It runs with its tensors' GPU as the current one, which is where Triton launches.
    """
    register = torch.library.custom_op(f"{NAMESPACE}::{name}", mutates_args=tuple(mutates))
    return lambda function: register(on_their_device(function))


def on_their_device(function: Function) -> Function:
    """The function with its first tensor's GPU as the current one: there Triton launches."""

    @functools.wraps(function)
    def there(*arguments: Any, **options: Any) -> Any:
        device = next(_tensors(arguments)).device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return function(*arguments, **options)
        with torch.cuda.device(device):
            return function(*arguments, **options)

    return there  # type: ignore[return-value]


def _tensors(arguments: Sequence[Any]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, Sequence) and not isinstance(argument, str):
            yield from _tensors(argument)
