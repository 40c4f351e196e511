"""The registered ops behind op.py: rows to their places and back, by the kernels or in PyTorch.

On a GPU every row is read and written once, with the embeddings added on the way, and no backward
needs an atomic add (kernel.py). The twins are index_select, index_copy and sums. Gathering and
assembling mirror one another: each one's backward is the other's forward with sums over rows.

Shapes: B clips, N grid tokens, M rows of all clips or sequences, K kept tokens, R rows of all
groups, D width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backend import use_triton
from ..checks import check_in_range, reads_values
from ..library import custom_op
from ..packing import packed_rows
from ..precision import wide


@custom_op("gather_tokens")
def gather_tokens(
    tokens: Tensor, groups: Sequence[Tensor], add: Tensor | None, backend: str
) -> Tensor:
    """Rows of tokens [B, N, D] named by each group's [B, K], plus add [D]: [R, D]."""
    for index_BK in groups:
        check_in_range("index", index_BK, tokens.shape[1], "the tokens of a clip")
        _check_once("index", index_BK)
    x_MD = _rows_apart(tokens.flatten(0, 1))
    row_R = packed_rows(groups, tokens.shape[1])
    if use_triton(backend, tokens):
        from . import kernel

        return kernel.gather_rows(x_MD, row_R, add)
    out_RD = x_MD.index_select(0, row_R)
    return out_RD if add is None else out_RD.add_(add.to(out_RD.dtype))


@gather_tokens.register_fake
def _(tokens: Tensor, groups: Sequence[Tensor], add: Tensor | None, backend: str) -> Tensor:
    return tokens.new_empty(sum(index.numel() for index in groups), tokens.shape[2])


@custom_op("gather_tokens_backward")
def _gather_backward(
    grad: Tensor, groups: Sequence[Tensor], num_tokens: int, sums: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """The gradient of tokens [B * N, D], and of add [1, D] if `sums`, else [0, D]."""
    out_MD = grad.new_empty(len(groups[0]) * num_tokens, grad.shape[1])
    row_R, sizes = packed_rows(groups, num_tokens), [index.numel() for index in groups]
    if use_triton(backend, grad):
        from . import kernel

        return out_MD, kernel.place_rows(_rows_apart(grad), row_R, sizes, out_MD, sums=sums)
    out_MD.zero_()
    for row, grad_RD in zip(row_R.split(sizes), grad.split(sizes), strict=True):
        out_MD.index_add_(0, row, grad_RD)
    sum_1D = grad.sum(0, keepdim=True, dtype=wide(grad.dtype))
    return out_MD, sum_1D if sums else sum_1D.new_empty(0, grad.shape[1])


@_gather_backward.register_fake
def _(
    grad: Tensor, groups: Sequence[Tensor], num_tokens: int, sums: bool, backend: str
) -> tuple[Tensor, Tensor]:
    out_MD = grad.new_empty(len(groups[0]) * num_tokens, grad.shape[1])
    return out_MD, grad.new_empty(int(sums), grad.shape[1], dtype=wide(grad.dtype))


def _keep_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, groups, add, ctx.backend = inputs
    ctx.save_for_backward(*groups)
    ctx.shape, ctx.add_dtype = tokens.shape, None if add is None else add.dtype


def _from_gather(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    groups, sums = list(ctx.saved_tensors), ctx.add_dtype is not None
    dtokens, dadd_KD = _gather_backward(grad, groups, ctx.shape[1], sums, ctx.backend)
    dadd = dadd_KD[0].to(ctx.add_dtype) if sums else None
    return dtokens.view(ctx.shape), [None] * len(groups), dadd, None


gather_tokens.register_autograd(_from_gather, setup_context=_keep_gather)


@custom_op("place_sequences")
def place_sequences(
    context_groups: Sequence[Tensor], predict_groups: Sequence[Tensor], by_token: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's token, and the rows of the context and of the predicted tokens, all packed."""
    indices, context_rows, predict_rows, begin = [], [], [], 0
    for context_BK, predict_BK in zip(context_groups, predict_groups, strict=True):
        index_BS = torch.cat((context_BK, predict_BK), dim=1).long()
        _check_once("context_index and predict_index", index_BS)
        if by_token:
            index_BS, order_BS = index_BS.sort(dim=1)
            place_BS = order_BS.argsort(dim=1)
        else:
            place_BS = torch.arange(index_BS.shape[1], device=index_BS.device).expand_as(index_BS)
        first_B1 = torch.arange(len(index_BS), device=index_BS.device)[:, None] * index_BS.shape[1]
        context_row, predict_row = (begin + first_B1 + place_BS).split(
            [context_BK.shape[1], predict_BK.shape[1]], dim=1
        )
        indices.append(index_BS.flatten())
        context_rows.append(context_row.flatten())
        predict_rows.append(predict_row.flatten())
        begin += index_BS.numel()
    return torch.cat(indices), torch.cat(context_rows), torch.cat(predict_rows)


@place_sequences.register_fake
def _(
    context_groups: Sequence[Tensor], predict_groups: Sequence[Tensor], by_token: bool
) -> tuple[Tensor, Tensor, Tensor]:
    context, predict = (sum(i.numel() for i in g) for g in (context_groups, predict_groups))
    like = context_groups[0].new_empty(0, dtype=torch.int64)
    return like.new_empty(context + predict), like.new_empty(context), like.new_empty(predict)


@custom_op("assemble_tokens")
def assemble_tokens(
    context: Tensor, mask: Tensor, add: Tensor | None, row: Tensor, num_rows: int, backend: str
) -> Tensor:
    """Context [R, D] in rows `row` of [M, D], mask [D] in the others, plus add [D].

    `row` names every row once at most.
    """
    dtype = torch.promote_types(context.dtype, mask.dtype)
    out_MD = context.new_empty((num_rows, context.shape[1]), dtype=dtype)
    if use_triton(backend, context):
        from . import kernel

        x_RD = _rows_apart(context)
        kernel.place_rows(x_RD, row, [len(row)], out_MD, fill_D=mask, add_D=add)
        return out_MD
    context, mask = context.to(dtype), mask.to(dtype)
    if add is not None:
        context, mask = context + add.to(dtype), mask + add.to(dtype)
    return out_MD.copy_(mask.expand_as(out_MD)).index_copy_(0, row, context)


@assemble_tokens.register_fake
def _(
    context: Tensor, mask: Tensor, add: Tensor | None, row: Tensor, num_rows: int, backend: str
) -> Tensor:
    dtype = torch.promote_types(context.dtype, mask.dtype)
    return context.new_empty((num_rows, context.shape[1]), dtype=dtype)


@custom_op("assemble_tokens_backward")
def _assemble_backward(
    grad: Tensor, row: Tensor, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    """The gradient of context [R, D], and the sums of all rows and of the mask token's [2, D]."""
    if use_triton(backend, grad):
        from . import kernel

        out_RD = grad.new_empty((len(row), grad.shape[1]), dtype=dtype)
        return out_RD, kernel.take_apart(_rows_apart(grad), row, out_RD)
    masked = torch.ones(len(grad), dtype=torch.bool, device=grad.device).index_fill_(0, row, False)
    grad_RD = grad.index_select(0, row)
    mask_D = grad.index_select(0, masked.nonzero()[:, 0]).sum(0, dtype=wide(grad.dtype))
    every_D = grad_RD.sum(0, dtype=mask_D.dtype) + mask_D
    return grad_RD.to(dtype), torch.stack((every_D, mask_D))


@_assemble_backward.register_fake
def _(grad: Tensor, row: Tensor, dtype: torch.dtype, backend: str) -> tuple[Tensor, Tensor]:
    width = grad.shape[1]
    return (
        grad.new_empty((len(row), width), dtype=dtype),
        grad.new_empty((2, width), dtype=wide(grad.dtype)),
    )


def _keep_assemble(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    context, mask, add, row, _, ctx.backend = inputs
    ctx.save_for_backward(row)
    ctx.dtypes = context.dtype, mask.dtype, None if add is None else add.dtype


def _from_assemble(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    context, mask, add = ctx.dtypes
    dcontext, sums_2D = _assemble_backward(grad, *ctx.saved_tensors, context, ctx.backend)
    dadd = None if add is None else sums_2D[0].to(add)
    return dcontext, sums_2D[1].to(mask), dadd, None, None, None


assemble_tokens.register_autograd(_from_assemble, setup_context=_keep_assemble)


def _rows_apart(x_RD: Tensor) -> Tensor:
    """x, or a copy if the values of a row do not lie side by side."""
    return x_RD if x_RD.stride(1) == 1 else x_RD.contiguous()


def _check_once(name: str, index_BK: Tensor) -> None:
    """Raises ValueError if a clip names a token twice or one below 0, where values may be read."""
    if not reads_values(index_BK) or index_BK.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(index_BK))
    if low < 0:
        raise ValueError(f"{name}: expected token indices from 0, got {low}")
    clip_B1 = torch.arange(len(index_BK), device=index_BK.device)[:, None] * (high + 1)
    most = int(torch.bincount((index_BK + clip_B1).flatten()).max())
    if most > 1:
        raise ValueError(f"{name}: expected every token of a clip once, got one {most} times")
