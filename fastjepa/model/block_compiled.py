"""What lies around attention in a block, as two functions that torch.compile can take.

    before, after = compiled_halves()  # the same, compiled once for all blocks of a shape

Compiled, norm, GELU and residual are passes of the products' neighbours, and norms write what the
products read. Attention and rotary positions stay outside: they are single kernels of their own.
The number of rows is a symbol from the start, so that masks of other sizes compile nothing anew.

Shapes: R packed rows, D width, H heads, C head channels.
"""

import os
import shutil
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from fastjepa.model.block import Block

Before = Callable[["Block", Tensor], Tensor]
After = Callable[["Block", Tensor, Tensor], Tensor]


def before_attention(block: "Block", x_RD: Tensor) -> Tensor:
    """Queries, keys and values of the normed rows: [R, 3, H, C]."""
    qkv_R3HC: Tensor = block.attn.qkv(block.norm1(x_RD)).unflatten(-1, (3, block.attn.heads, -1))
    return qkv_R3HC


def after_attention(block: "Block", x_RD: Tensor, mixed_RD: Tensor) -> Tensor:
    """The rows after attention's output and the MLP have been added: [R, D]."""
    x_RD = x_RD + block.attn.proj(mixed_RD)
    out_RD: Tensor = x_RD + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x_RD))))
    return out_RD


@lru_cache(maxsize=1)
def compiled_halves() -> tuple[Before, After]:
    """Both functions, compiled when a device, dtype, width or use of gradients is first seen."""
    before = torch.compile(before_attention)
    after = torch.compile(after_attention)

    def any_rows_before(block: "Block", x_RD: Tensor) -> Tensor:
        torch._dynamo.maybe_mark_dynamic(x_RD, 0)
        return before(block, x_RD)

    def any_rows_after(block: "Block", x_RD: Tensor, mixed_RD: Tensor) -> Tensor:
        torch._dynamo.maybe_mark_dynamic(x_RD, 0)
        torch._dynamo.maybe_mark_dynamic(mixed_RD, 0)
        return after(block, x_RD, mixed_RD)

    return any_rows_before, any_rows_after


def compile_refusal(device: torch.device) -> str | None:
    """Why blocks cannot be compiled for a device; None if they can."""
    if device.type == "cuda":
        return None if find_spec("triton") else "triton is not installed"
    compilers = [os.environ.get("CXX"), "g++", "clang++"]
    if not any(name and shutil.which(name) for name in compilers):
        return "it needs a C++ compiler on a CPU, and neither g++ nor clang++ is there"
    return None
