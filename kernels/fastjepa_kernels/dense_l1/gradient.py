"""The backward of a loss whose gradient its forward has written: times the upstream scalar.

The stored gradient becomes the returned one in place. Only where the graph is kept for another
backward (`retain_graph`, `create_graph`) is it left as it is and a scaled copy returned.
"""

import torch
from torch import Tensor

from ..backend import use_triton
from ..library import custom_op


def scaled(stored: Tensor, upstream: Tensor | None, factor: float, backend: str) -> Tensor | None:
    """`stored * upstream * factor`; `upstream` 0-d on the same device, which is not waited for.

    Nothing flows back where nothing comes in.
    """
    if upstream is None:
        return None
    if torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph():
        copy: Tensor = _scaled_gradient(stored, upstream, factor, backend)
        return copy
    _scale_gradient_(stored, upstream, factor, backend)
    return stored.detach()


@custom_op("scaled_gradient")
def _scaled_gradient(stored: Tensor, upstream: Tensor, factor: float, backend: str) -> Tensor:
    result = torch.empty_like(stored)
    result.copy_(stored)
    _scale(result, upstream, factor, backend)
    return result


@_scaled_gradient.register_fake
def _(stored: Tensor, upstream: Tensor, factor: float, backend: str) -> Tensor:
    return torch.empty_like(stored)


@custom_op("scale_gradient_", mutates=["stored"])
def _scale_gradient_(stored: Tensor, upstream: Tensor, factor: float, backend: str) -> None:
    _scale(stored, upstream, factor, backend)


def _scale(stored: Tensor, upstream: Tensor, factor: float, backend: str) -> None:
    if stored.device.type == "cpu" and not use_triton(backend, stored):
        number = upstream.item() * factor
        if number != 1.0:
            stored *= number
        return
    # One axis, so that a low-precision gradient is multiplied by all digits of the scalar.
    torch.mul(stored, (upstream * factor).view(1, 1), out=stored)
