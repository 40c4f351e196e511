"""k nearest neighbours: classes of clips from the labelled clips whose features are most alike.

Shapes: N labelled samples (the bank), M queries, D channels, C classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

KS = (1, 5, 10, 20, 50, 100, 200)
_QUERIES = 1024


def knn(
    bank_ND: Tensor,
    labels_N: Tensor,
    queries_MD: Tensor,
    *,
    ks: Sequence[int] = KS,
    temperature: float = 0.07,
) -> dict[int, Tensor]:
    """The class of each query, int64 [M], for every k of `ks` that the bank can serve.

    The k neighbours of highest cosine similarity vote with the weight exp(similarity /
    temperature); of equal classes the lowest number wins. bank_ND, queries_MD: float; labels_N:
    int64, 0 or more. Raises ValueError for shapes that do not fit, for a temperature that is not
    above 0, and when no k from 1 to N is asked for.
    """
    if bank_ND.ndim != 2 or queries_MD.ndim != 2 or bank_ND.shape[1] != queries_MD.shape[1]:
        raise ValueError(
            "knn: expected a bank [N, D] and queries [M, D], found "
            f"{tuple(bank_ND.shape)} and {tuple(queries_MD.shape)}"
        )
    if labels_N.shape != bank_ND.shape[:1]:
        raise ValueError(f"knn: {tuple(labels_N.shape)} labels for {len(bank_ND)} samples")
    if not temperature > 0.0:
        raise ValueError(f"knn: temperature is {temperature}, expected more than 0")
    usable = sorted({k for k in ks if 1 <= k <= len(bank_ND)})
    if not usable:
        raise ValueError(f"knn: ks is {list(ks)}, expected some from 1 to {len(bank_ND)}")
    bank_ND = normalize(bank_ND.float(), dim=1)
    num_classes = int(labels_N.max()) + 1
    found: dict[int, list[Tensor]] = {k: [] for k in usable}
    for part_MD in queries_MD.float().split(_QUERIES):
        similarity_MK, index_MK = (normalize(part_MD, dim=1) @ bank_ND.T).topk(usable[-1], dim=1)
        # The nearest weighs 1: no overflow at any temperature.
        weight_MK = ((similarity_MK - similarity_MK[:, :1]) / temperature).exp()
        for k in usable:
            votes_MC = weight_MK.new_zeros(len(part_MD), num_classes)
            votes_MC.scatter_add_(1, labels_N[index_MK[:, :k]], weight_MK[:, :k])
            found[k].append(votes_MC.argmax(1))
    empty = labels_N.new_empty(0)
    return {k: torch.cat(parts) if parts else empty for k, parts in found.items()}


def accuracy(predicted_M: Tensor, labels_M: Tensor) -> float:
    """The share of predictions that are right, 0 to 1."""
    return (predicted_M == labels_M).double().mean().item()
