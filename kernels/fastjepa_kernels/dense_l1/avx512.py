"""The dense loss on a CPU with AVX-512, in C++ (avx512.cpp): one pass over predictions and the
target rows that they name.

It takes the mean of |z - y|, which is what V-JEPA 2.1 trains on; twin.py takes the rest.

Shapes: R all rows, r some of them, E = L D channels, L levels, D width, M target rows.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from ..avx512 import IN_A_WORD, Avx512
from .comparison import Comparison
from .twin import finish, slopes

__all__ = ["compare", "finish", "refusal"]


class _Rows(ctypes.Structure):
    """What the C++ is given, as it has it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("z", "dz", "targets")),
        *((name, ctypes.c_int64) for name in ("z_row", "dz_row")),
        *((name, ctypes.c_void_p) for name in ("target_row", "index", "slope", "beta", "sums")),
        *((name, ctypes.c_int64) for name in ("sums_level", "rows", "levels", "width")),
    )


_cpp = Avx512(
    Path(__file__).with_suffix(".cpp"),
    {"compare": [ctypes.c_int, ctypes.c_int, _Rows, ctypes.c_int, ctypes.c_float]},
)


def refusal(prediction: Tensor, comparison: Comparison) -> str | None:
    """Why it cannot compare these; None if it can. The first call that gets so far compiles, which
    takes seconds once on a machine."""
    if comparison.exponent != 1.0 or comparison.smooth or comparison.normalize_prediction:
        return "it takes the mean of |z - y| of predictions as they are"
    (target, *others) = {target.dtype for target in comparison.targets_MD}
    if others:
        return "it takes targets of one dtype"
    return _cpp.refusal(prediction.device, prediction.dtype, target)


def compare(
    comparison: Comparison,
    z_rE: Tensor,
    first: int,
    sums_RL: Tensor,
    dz_rE: Tensor | None,
    scale: float,
) -> None:
    """As twin.py's, where `refusal` is None."""
    rows, width = len(z_rE), comparison.width
    z = z_rE if z_rE.stride(-1) == 1 else z_rE.contiguous()
    targets = comparison.targets_MD
    levels = len(targets)
    index = comparison.row_R[first : first + rows].to(torch.int64)
    slope = slopes(comparison, first, rows, sums_RL).mul_(scale)
    beta = sums_RL.new_tensor(comparison.level_weights)
    sums = sums_RL[first : first + rows]
    assert sums.stride(0) == 1
    assert dz_rE is None or dz_rE.stride(-1) == 1
    places = (ctypes.c_void_p * levels)(*(target.data_ptr() for target in targets))
    apart = (ctypes.c_int64 * levels)(*(target.stride(0) for target in targets))
    all_rows = _Rows(
        z.data_ptr(), None if dz_rE is None else dz_rE.data_ptr(), ctypes.addressof(places),
        z.stride(0), 0 if dz_rE is None else dz_rE.stride(0), ctypes.addressof(apart),
        index.data_ptr(), slope.data_ptr(), beta.data_ptr(), sums.data_ptr(), sums.stride(1),
        rows, levels, width,
    )  # fmt: skip
    kinds = IN_A_WORD[z.dtype], IN_A_WORD[targets[0].dtype]
    _cpp.run("compare", *kinds, all_rows, comparison.normalize_target, comparison.eps)
