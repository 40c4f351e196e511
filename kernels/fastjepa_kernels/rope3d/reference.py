"""Rotary positions: turn adjacent channel pairs (2j, 2j+1) by the angles of a table.

Shapes: ... leading dims, C head channels.
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
