"""Visible tokens of a clip picked, and the predictor's sequences put together, each in one pass.

Here are the checks of shapes and the results' shapes; rows.py moves the rows.

One mask group is an index tensor [B, K] and gives [B, K, D]. Several are a list of them: rows then
lie behind one another, group after group, clip after clip ([R, D], the order of `packed_rows`).

Shapes: B clips, N grid tokens, K kept tokens, S tokens of a sequence, R rows of all groups, D
width.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..backend import Backend
from ..checks import INDEX_DTYPES, check_same_device
from . import rows

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Index = Tensor | Sequence[Tensor]
Order = Literal["packed", "token"]


class Assembled(NamedTuple):
    """Sequences, and which row is which.

    tokens: [B, S, D] for one mask group, packed [R, D] for a list of them. The others are packed,
    int64: index_R is each row's token (`rope3d` takes it as its index); context_row and
    predict_row say in which row each context and each predicted token is.
    """

    tokens: Tensor
    index_R: Tensor
    context_row: Tensor
    predict_row: Tensor


def gather_tokens(
    tokens_BND: Tensor, index_BK: Index, *, add: Tensor | None = None, backend: Backend = "auto"
) -> Tensor:
    """The rows of each clip that an index names, plus `add`.

    tokens_BND: [B, N, D], float16 to float64. index_BK: int32 or int64, [B, K] or a list of them;
    a token occurs once at most in a clip of a group, and may in several groups. add: a modality
    embedding of D values ([D] or [1, 1, D]), cast to the tokens' dtype after adding. Returns
    [B, K, D], or packed [R, D] for a list. Differentiable in tokens and add. Raises ValueError for
    shapes, dtypes, devices or indices that do not fit. (docs/method.md section 2.)
    """
    if tokens_BND.ndim != 3 or tokens_BND.dtype not in DTYPES:
        raise ValueError(
            f"tokens: expected floats [B, N, D], got {tokens_BND.dtype} {tuple(tokens_BND.shape)}"
        )
    clips, _, width = tokens_BND.shape
    groups_BK = _groups("index", index_BK)
    if any(len(index) != clips for index in groups_BK):
        counts = [len(index) for index in groups_BK]
        raise ValueError(f"index: expected {clips} clips like tokens, got {counts}")
    add_D = None if add is None else _row_of("add", add, width)
    check_same_device(tokens=tokens_BND, add=add, **_named("index", groups_BK))
    out_RD: Tensor = rows.gather_tokens(tokens_BND, groups_BK, add_D, backend)
    return out_RD.view(*index_BK.shape, width) if isinstance(index_BK, Tensor) else out_RD


def assemble_tokens(
    context: Tensor,
    mask_token: Tensor,
    context_index_BK: Index,
    predict_index_BK: Index,
    *,
    add: Tensor | None = None,
    order: Order = "packed",
    backend: Backend = "auto",
) -> Assembled:
    """The predictor's sequences: context rows, a mask token for each predicted one, `add` on all.

    context: [B, K, D], or packed [R, D] when the indices are lists, float16 to float64.
    mask_token, add: D values ([D] or [1, 1, D]). Indices: int32 or int64 [B, K]; within a clip of
    a group every token is named once at most. order: "packed", context before predicted tokens, or
    "token", by index. Tokens are returned in the wider dtype of context and mask token; see
    `Assembled` for the rest. Differentiable in context, mask_token and add. Raises ValueError for
    shapes, dtypes, devices or indices that do not fit. (docs/method.md section 4.)
    """
    single = isinstance(context_index_BK, Tensor)
    if single != isinstance(predict_index_BK, Tensor):
        raise ValueError("predict_index: expected a list if context_index is one, else a tensor")
    if order not in ("packed", "token"):
        raise ValueError(f"order: expected packed or token, got {order}")
    if context.ndim != (3 if single else 2) or context.dtype not in DTYPES:
        raise ValueError(
            f"context: expected floats {'[B, K, D]' if single else '[R, D] with lists'}, "
            f"got {context.dtype} {tuple(context.shape)}"
        )
    context_groups = _groups("context_index", context_index_BK)
    predict_groups = _groups("predict_index", predict_index_BK)
    clips, predict_clips = ([len(i) for i in groups] for groups in (context_groups, predict_groups))
    if clips != predict_clips:
        raise ValueError(f"predict_index: expected groups of {clips} clips, got {predict_clips}")
    width, num_rows = context.shape[-1], sum(index.numel() for index in context_groups)
    expected = (*context_groups[0].shape, width) if single else (num_rows, width)
    if tuple(context.shape) != expected:
        raise ValueError(
            f"context: expected {expected} for these indices, got {tuple(context.shape)}"
        )
    mask_D = _row_of("mask_token", mask_token, width)
    add_D = None if add is None else _row_of("add", add, width)
    check_same_device(
        context=context, mask_token=mask_token, add=add,
        **_named("context_index", context_groups), **_named("predict_index", predict_groups),
    )  # fmt: skip
    index_R, context_row, predict_row = rows.place_sequences(
        context_groups, predict_groups, order == "token"
    )
    tokens: Tensor = rows.assemble_tokens(
        context.reshape(num_rows, width), mask_D, add_D, context_row, len(index_R), backend
    )
    if single:
        length = context_groups[0].shape[1] + predict_groups[0].shape[1]
        tokens = tokens.view(clips[0], length, width)
    return Assembled(tokens, index_R, context_row, predict_row)


def _groups(name: str, index_BK: Index) -> list[Tensor]:
    groups_BK = [index_BK] if isinstance(index_BK, Tensor) else list(index_BK)
    if not groups_BK:
        raise ValueError(f"{name}: expected at least one mask group, got an empty list")
    for index in groups_BK:
        if index.ndim != 2 or index.dtype not in INDEX_DTYPES:
            raise ValueError(
                f"{name}: expected int32 or int64 indices [B, K], "
                f"got {index.dtype} {tuple(index.shape)}"
            )
    return groups_BK


def _named(name: str, groups_BK: list[Tensor]) -> dict[str, Tensor]:
    return {f"{name}[{number}]": index for number, index in enumerate(groups_BK)}


def _row_of(name: str, x: Tensor, width: int) -> Tensor:
    """x [D], [1, D] or [1, 1, D] as [D]."""
    if x.dtype not in DTYPES or x.ndim == 0 or x.numel() != width or x.shape[-1] != width:
        raise ValueError(
            f"{name}: expected {width} floats, [{width}] or [1, 1, {width}], "
            f"got {x.dtype} {tuple(x.shape)}"
        )
    return x.reshape(width)
