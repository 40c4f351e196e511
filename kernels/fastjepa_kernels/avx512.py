"""Our C++ for CPUs with AVX-512: when a source of it can run, and how it is called.

It computes in float32, on tensors of float32, and of bfloat16 where the processor rounds to that
(AVX-512 BF16).
"""

import ctypes
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .native import CannotCompileError, load
from .precision import wide_vectors

# How many values of a dtype fill a word of 32 bits: which of the two the C++ is to take.
IN_A_WORD = {torch.float32: 1, torch.bfloat16: 2}
_OUT_OF_MEMORY = -1
_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mfma")


class View(ctypes.Structure):
    """Where a tensor's heads lie, as lanes.h has it."""

    _fields_ = (
        ("at", ctypes.c_void_p),
        *((axis, ctypes.c_int64) for axis in ("batch", "head", "token")),
    )

    @classmethod
    def of(cls, x_BHKC: Tensor) -> "View":
        """x: channels side by side."""
        return cls(x_BHKC.data_ptr(), *x_BHKC.stride()[:3])


class Avx512:
    """The functions of one source, which is compiled when it is first asked for: once on a machine,
    which takes seconds.

    `arguments`: of each function the types that come before its last, the number of threads.
    """

    def __init__(self, source: Path, arguments: Mapping[str, Sequence[Any]]) -> None:
        self._source, self._arguments = source, arguments

    @cached_property
    def _library(self) -> ctypes.CDLL | str:
        """The compiled library, or why there is none."""
        try:
            library = load(self._source, _FLAGS)
        except CannotCompileError as error:
            return str(error)
        for name, types in self._arguments.items():
            getattr(library, name).argtypes = [*types, ctypes.c_int]
        return library

    @lru_cache(maxsize=64)  # noqa: B019  (of few, which live as long as the process)
    def refusal(self, device: torch.device, *dtypes: torch.dtype) -> str | None:
        """Why it cannot work on such tensors; None if it can."""
        if device.type != "cpu":
            return f"it needs a CPU, not {device.type}"
        for dtype in dtypes:
            if dtype not in IN_A_WORD:
                return f"it takes float32 and bfloat16, not {str(dtype)[6:]}"
        if not wide_vectors():
            return "the processor, or this PyTorch on it, has no AVX-512"
        library = self._library
        if isinstance(library, str):
            return library
        if torch.bfloat16 in dtypes and not library.has_bfloat16():
            return "the processor does not multiply bfloat16 (AVX-512 BF16)"
        return None

    def run(self, name: str, *arguments: Any) -> None:
        """Calls a function, on as many threads as PyTorch takes, where `refusal` gives None. Raises
        MemoryError where there is too little for what it works with."""
        library = self._library
        assert isinstance(library, ctypes.CDLL), library
        result = getattr(library, name)(*arguments, torch.get_num_threads())
        if result == _OUT_OF_MEMORY:
            raise MemoryError(f"{self._source.parent.name}, {name}: not enough memory")
        assert result == 0, (name, result)
