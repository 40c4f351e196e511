"""Registration of the ops with PyTorch, under this package's own import name.

A copy of the package under another name registers ops of its own: nothing collides.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

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


def must_be_one_op(*tensors: Tensor) -> bool:
    """Whether a call with these tensors has to go through its registered op: something compiles,
    traces, counts or transforms it, such as checkpointing that keeps attention, or the tensors have
    no values. Else a registered op takes a small call's time several times over."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or any(t.is_meta or type(t) not in (Tensor, torch.nn.Parameter) for t in tensors)
    )


# Told of every call of what is `watched`: its arguments and options, and what it gave.
watchers: list[Callable[[Any, Any], None]] = []


def watched(function: Function) -> Function:
    """`on_their_device` for a function that is no op, since it is called too often for one.

    No dispatch mode sees it as a whole; while there are `watchers`, none sees what it is made of.
    """
    run = on_their_device(function)

    @functools.wraps(function)
    def told(*arguments: Any, **options: Any) -> Any:
        if not watchers:
            return run(*arguments, **options)
        with _disable_current_modes():
            out = run(*arguments, **options)
        for watcher in watchers:
            watcher((arguments, options), out)
        return out

    return told  # type: ignore[return-value]


def _tensors(arguments: Sequence[Any]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, Sequence) and not isinstance(argument, str):
            yield from _tensors(argument)
