"""The pre-norm transformer block: `x += attn(norm1(x)); x += mlp(norm2(x))` (docs/method.md
section 2).

The modules hold the weights under the released names. The arithmetic runs through block_cpu.py
or block_gpu.py, which give the same numbers with fewer passes and saved tensors; where they cannot
work, as it is written here.

Shapes: R packed rows, D width, H heads, C head channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastjepa.model import block_gpu
from fastjepa.model.attention import attend
from fastjepa.model.block_compiled import (
    after_attention,
    before_attention,
    compile_refusal,
    compiled_halves,
)
from fastjepa.model.block_cpu import attention_half, mlp_half
from fastjepa.model.block_gpu import Unsummed
from fastjepa.model.passes_cpu import widened
from fastjepa.model.positions import packed_table, turn_tiled
from fastjepa.model.segments import Segment, SharedRow
from fastjepa.presets import Rope
from fastjepa_kernels import rope3d
from fastjepa_kernels.backend import choose

EPS = 1e-6


class LayerNorm(nn.LayerNorm):
    """Its parameters may be narrower than its input (bfloat16 under a float32 stream)."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = widened(self.weight, input), widened(self.bias, input)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


def blocks_of(*networks: nn.Module) -> "list[Block]":
    """The transformer blocks of networks, in the order in which they run."""
    modules = (module for network in networks for module in network.modules())
    return [module for module in modules if isinstance(module, Block)]


def compile_blocks(*networks: nn.Module) -> None:
    """Let the blocks of networks run compiled (block_compiled.py) from now on.

    Blocks whose products are not plain ones stay as they are. Raises ValueError where nothing can
    be compiled for their device.
    """
    for block in (b for b in blocks_of(*networks) if type(b.mlp.fc1) is nn.Linear):
        refusal = compile_refusal(block.mlp.fc1.weight.device)
        if refusal is not None:
            raise ValueError(f"blocks cannot be compiled here: {refusal}")
        block.compiled = True


class Attention(nn.Module):
    """Weights of the attention: packed `qkv` (q, k, v, each heads x head width) and `proj`."""

    def __init__(self, width: int, heads: int, linear: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"heads: expected a divisor of width {width}, got {heads}")
        self.heads = heads
        self.qkv = linear(width, 3 * width)
        self.proj = linear(width, width)


class Mlp(nn.Module):
    """Weights of the MLP: `fc1`, exact GELU, `fc2`."""

    def __init__(self, width: int, hidden: int, linear: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.fc1 = linear(width, hidden)
        self.fc2 = linear(hidden, width)


class Block(nn.Module):
    """One block over a packed batch of sequences."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        *,
        attention: str = "auto",
        rope: Rope = "interleaved",
        linear: type[nn.Linear] = nn.Linear,
    ) -> None:
        super().__init__()
        self.backend, self.rope = attention, rope
        # Which way by hand runs: `auto` by device, `cpu`, `gpu` or none. Whether what lies around
        # attention is compiled (block_compiled.py), which leaves no use for them.
        self.by_hand: str | None = "auto" if rope == "interleaved" else None
        self.compiled = False
        self.norm1 = LayerNorm(width, eps=EPS)
        self.attn = Attention(width, heads, linear)
        self.norm2 = LayerNorm(width, eps=EPS)
        self.mlp = Mlp(width, mlp_width, linear)

    def forward(
        self,
        x_RD: Tensor,
        tables_RC2: Sequence[Tensor],
        segments: Sequence[Segment],
        shared: SharedRow | None = None,
        delta_RD: Tensor | None = None,
        shift_D: Tensor | None = None,
        *,
        recompute: bool = False,
        unsummed: bool = False,
    ) -> Tensor | Unsummed:
        """x_RD: [R, D]; tables: for each segment the rows of `rotary_table` in the block's layout,
        [count or 1, length, C/2, 2] or (tiled) [count or 1, length, C, 2], or a single one with a
        row for each of x's (`packed_table`).

        With `shared`, x is [U, D] with the row that the sequences share only once; the output is
        [R, D]. `recompute`: see block_cpu.py, which alone knows it. With `unsummed` the last
        addition may be left to the block behind it, which takes the three tensors that come as x,
        delta and shift (block_gpu.py): each an argument, for hooks on modules see no others.
        """
        way = self.way(x_RD)
        stream = x_RD if delta_RD is None or shift_D is None else (x_RD, delta_RD, shift_D)
        if way == "gpu":
            return self._on_a_gpu(stream, tables_RC2, segments, shared, unsummed=unsummed)
        x_RD = block_gpu.summed(stream)
        assert not recompute or way == "cpu"
        if way == "cpu":
            x_RD = attention_half(
                x_RD, self.norm1, self.attn, tables_RC2, segments, shared,
                backend=self.backend, recompute=recompute,
            )  # fmt: skip
            return mlp_half(x_RD, self.norm2, self.mlp, recompute=recompute)
        if shared:
            x_RD = shared.spread(x_RD)
        before, after = compiled_halves() if self.compiled else (before_attention, after_attention)
        mixed_RD = self.attend(before(self, x_RD), tables_RC2, segments)
        return after(self, x_RD, mixed_RD)

    def _on_a_gpu(
        self,
        stream: Tensor | Unsummed,
        tables_RC2: Sequence[Tensor],
        segments: Sequence[Segment],
        shared: SharedRow | None,
        *,
        unsummed: bool,
    ) -> Tensor | Unsummed:
        if shared:
            stream = shared.spread(block_gpu.summed(stream))
        table_RC2 = _packed(tables_RC2, segments)
        x_RD, q, k, v = block_gpu.before_attention(self, stream, table_RC2)
        mixed_RHC = attend(q, k, v, segments, backend=self.backend)
        out = block_gpu.after_attention(self, x_RD, mixed_RHC.flatten(1))
        return out if unsummed else block_gpu.summed(out)

    def way(self, x: Tensor) -> str | None:
        """Which of the hand-written ways runs on such rows, `cpu` or `gpu`; None for the plain."""
        if self.compiled:
            return None
        if self.by_hand != "auto":
            return self.by_hand
        if x.device.type == "cpu":
            plain = type(self.mlp.fc1) is nn.Linear
            return "cpu" if plain and self.backend in ("auto", "sdpa", "avx512") else None
        if x.dtype == torch.float64 or torch.compiler.is_compiling():
            return None
        return "gpu" if choose("auto", x.device).name == "triton" else None

    def tables(
        self, x: Tensor, tables_RC2: Sequence[Tensor], segments: Sequence[Segment]
    ) -> list[Tensor]:
        """The segments' tables as blocks like this one take them fastest."""
        if self.way(x) == "cpu":
            return list(tables_RC2)
        return [packed_table(tables_RC2, segments)]

    def attend(
        self, qkv_R3HC: Tensor, tables_RC2: Sequence[Tensor], segments: Sequence[Segment]
    ) -> Tensor:
        """Rotated queries and keys, and their attention, heads side by side: [R, D]."""
        turn = turn_tiled if self.rope == "tiled" else rope3d
        qkv_R3HC = turn(qkv_R3HC, _packed(tables_RC2, segments))
        q, k, v = qkv_R3HC.unbind(1)
        return attend(q, k, v, segments, backend=self.backend).flatten(1)


def _packed(tables_RC2: Sequence[Tensor], segments: Sequence[Segment]) -> Tensor:
    """The table with a row for each packed row, made if it is not there."""
    if len(tables_RC2) == 1 and tables_RC2[0].ndim == 3:
        return tables_RC2[0]
    return packed_table(tables_RC2, segments)
