"""The ops of V-JEPA 2.1 that are worth fusing, usable in any JEPA codebase: torch in, torch out.

One folder an op. `reference.py` is the formula in plain PyTorch, differentiable and written to be
read: the truth in tests. `op.py` is what users call: checks, then the fastest way at hand to the
same numbers.
"""

from fastjepa_kernels.dense_l1.op import dense_l1, linear_dense_l1
from fastjepa_kernels.ema.op import ema_update
from fastjepa_kernels.mask_distance.op import mask_distance
from fastjepa_kernels.packing import packed_rows
from fastjepa_kernels.rope3d.op import rope3d

__all__ = ["dense_l1", "ema_update", "linear_dense_l1", "mask_distance", "packed_rows", "rope3d"]
