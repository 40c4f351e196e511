"""The ops of V-JEPA 2.1 that are worth fusing, usable in any JEPA codebase: torch in, torch out.

One folder an op. `reference.py` is the formula in plain PyTorch, differentiable and written to be
read: the truth in tests. `op.py` is what users call: checks, then the fastest way at hand to the
same numbers.
"""

from .dense_l1.linear import linear_dense_l1
from .dense_l1.op import dense_l1
from .ema.op import ema_update
from .mask_distance.op import mask_distance, mask_distance_jagged
from .packed_attention.op import packed_attention
from .packing import packed_rows
from .rope3d.op import rope3d, rope3d_
from .tokens.op import Assembled, assemble_tokens, gather_tokens

__all__ = [
    "Assembled",
    "assemble_tokens",
    "dense_l1",
    "ema_update",
    "gather_tokens",
    "linear_dense_l1",
    "mask_distance",
    "mask_distance_jagged",
    "packed_attention",
    "packed_rows",
    "rope3d",
    "rope3d_",
]
