"""The backward of a loss whose gradient its forward has written: times the upstream scalar.

The stored gradient becomes the returned one in place. Where the graph is kept for another backward
(`retain_graph`, `create_graph`), and inside a compiled graph, it is left as it is and a scaled copy
returned.
"""

import torch
from torch import Tensor

from ..backend import use_triton
from ..library import custom_op
from ..saved import needed_again


def scaled(stored: Tensor, upstream: Tensor | None, factor: float, backend: str) -> Tensor | None:
    """`stored * upstream * factor`; `upstream` 0-d on the same device, which is not waited for.

    Nothing flows back where nothing comes in.
    """
    if upstream is None:
        return None
    if needed_again(stored):
        copy: Tensor = _scaled_gradient(stored, upstream, factor, backend)
        return copy
    own = stored.detach()
    _scale(own, own, upstream, factor, backend)
    return own


@custom_op("scaled_gradient")
def _scaled_gradient(stored: Tensor, upstream: Tensor, factor: float, backend: str) -> Tensor:
    copy = torch.empty_like(stored)
    _scale(stored, copy, upstream, factor, backend)
    return copy


@_scaled_gradient.register_fake
def _(stored: Tensor, upstream: Tensor, factor: float, backend: str) -> Tensor:
    return torch.empty_like(stored)


def _scale(stored: Tensor, out: Tensor, upstream: Tensor, factor: float, backend: str) -> None:
    if stored.dtype != torch.float64 and use_triton(backend, stored):
        from . import kernel

        kernel.scale(stored, out, upstream, factor)
    elif stored.device.type == "cpu":
        number = upstream.item() * factor
        if number != 1.0 or out is not stored:
            torch.mul(stored, number, out=out)
    else:
        # With axes of its own the scalar keeps its digits beside a gradient of fewer.
        torch.mul(stored, (upstream * factor).view((1,) * stored.ndim), out=out)
