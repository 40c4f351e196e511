"""Picking tokens and putting sequences together, in plain PyTorch (docs/method.md sections 2 and
4).

Shapes: B clips, N grid tokens, K kept tokens, S tokens of a sequence, D width.
"""

import torch
from torch import Tensor


def gather_tokens(tokens_BND: Tensor, index_BK: Tensor, add: Tensor | None = None) -> Tensor:
    """`tokens[b, index[b, k]] + add`: [B, K, D] in the tokens' dtype."""
    where = index_BK.long()[..., None].expand(-1, -1, tokens_BND.shape[-1])
    picked_BKD = tokens_BND.gather(1, where)
    return picked_BKD if add is None else (picked_BKD + add).to(tokens_BND.dtype)


def assemble_tokens(
    context_BKD: Tensor,
    mask_token: Tensor,
    context_index_BK: Tensor,
    predict_index_BK: Tensor,
    add: Tensor | None = None,
    order: str = "packed",
) -> tuple[Tensor, Tensor]:
    """Each clip's context rows and a mask token for each predicted one, plus `add`, and the token
    index of every row: [B, S, D] in the wider dtype of the two, [B, S].

    In "token" order rows are sorted by index; "packed", context rows come first.
    """
    predicted_BKD = mask_token.expand(*predict_index_BK.shape, mask_token.shape[-1])
    x_BSD = torch.cat((context_BKD, predicted_BKD), dim=1)
    if add is not None:
        x_BSD = (x_BSD + add).to(x_BSD.dtype)
    index_BS = torch.cat((context_index_BK, predict_index_BK), dim=1)
    if order == "token":
        index_BS, place_BS = index_BS.sort(dim=1)
        x_BSD = gather_tokens(x_BSD, place_BS)
    return x_BSD, index_BS
