"""Rotary positions: turn adjacent channel pairs (2j, 2j+1) by the angles of a table.

Shapes: N tokens, M table rows, H heads, C head channels, ... leading dims.
"""

import torch
from torch import Tensor


def rotate(x_C: Tensor, table_C2: Tensor) -> Tensor:
    """`out = x cos + rot(x) sin` with `rot([a, b]) = [-b, a]` on adjacent channels.

    x_C: [..., C], C even. table_C2: [..., C/2, 2] (cos, sin), broadcast against x's leading
    dimensions. Returns x's dtype; computed in the wider of both dtypes. (docs/method.md section
    2, rotary positions.)
    """
    cos_C, sin_C = (t.repeat_interleave(2, dim=-1) for t in table_C2.unbind(-1))
    even, odd = x_C.unflatten(-1, (-1, 2)).unbind(-1)
    turned_C = torch.stack((-odd, even), dim=-1).flatten(-2)
    return (x_C * cos_C + turned_C * sin_C).to(x_C.dtype)


def rope3d(qkv_N3HC: Tensor, table_MC2: Tensor, index_N: Tensor | None = None) -> Tensor:
    """q and k of a packed qkv [..., N, 3, H, C] turned, v as it is (docs/method.md section 2).

    table_MC2: [..., N, C/2, 2], or [M, C/2, 2] whose rows `index_N` [..., N] names.
    """
    table_NC2 = table_MC2 if index_N is None else table_MC2[index_N]
    q, k, v = qkv_N3HC.unbind(-3)
    turn = table_NC2[..., None, :, :]
    return torch.stack((rotate(q, turn), rotate(k, turn), v), dim=-3)
