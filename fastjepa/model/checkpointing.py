"""Blocks that keep their input alone and run again in the backward, whole or but for attention."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from fastjepa.model.block import Block

# In the names of the operations whose outputs are kept: PyTorch's dense and packed attention,
# FlashAttention's and xFormers' forwards.
_ATTENTION = ("attention", "attn", "flash_fwd")


def run_block(
    block: nn.Module,
    stream: Sequence[Tensor],
    *inputs: Any,
    checkpointing: bool,
    keep_attention: bool,
    unsummed: bool,
) -> Sequence[Tensor]:
    """The residual stream behind `block`: its rows, or with `unsummed` perhaps them and an addition
    that is left to the next block (block_gpu.py), which takes what comes. inputs: tables, segments
    and what is shared. With `checkpointing`, where there are gradients: `run_checkpointed`.
    """
    x_RD, *added = stream
    if checkpointing and torch.is_grad_enabled():
        return [run_checkpointed(block, x_RD, *inputs, keep_attention=keep_attention)]
    out = block(x_RD, *inputs, *added, unsummed=unsummed)
    return [out] if isinstance(out, Tensor) else out


def run_checkpointed(block: nn.Module, *inputs: Any, keep_attention: bool) -> Tensor:
    """`block(*inputs)` that keeps `inputs`, and with `keep_attention` what attention gave, whose
    operations grow with the square of the tokens while its output does not.

    A block that runs by hand on a CPU keeps the input of its MLP then, too, and repeats two of four
    products (block_cpu.py).
    """
    assert isinstance(block, Block)
    by_hand = keep_attention and block.way(inputs[0]) == "cpu"
    if by_hand:
        whole: Tensor = block(*inputs, recompute=True)
        return whole
    contexts = (
        partial(create_selective_checkpoint_contexts, _policy)
        if keep_attention
        else noop_context_fn
    )
    out: Tensor = checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)
    return out


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = str(operation)
    kept = any(word in name for word in _ATTENTION)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
