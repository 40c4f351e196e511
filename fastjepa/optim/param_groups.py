"""AdamW's parameter groups: no weight decay on biases and one-dimensional parameters
(docs/method.md section 6)."""

from collections.abc import Iterable
from typing import Any

from torch import nn


def param_groups(modules: Iterable[nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups a module, decayed and not; `decay` tells the schedule which is which.

    Mask tokens and modality embeddings are [1, 1, D] and decayed, as in the reference.
    """
    decayed: list[dict[str, Any]] = []
    free: list[dict[str, Any]] = []
    for module in modules:
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        plain = [p for n, p in named if "bias" in n or p.ndim == 1]
        rest = [p for n, p in named if not ("bias" in n or p.ndim == 1)]
        decayed.append({"params": rest, "weight_decay": weight_decay, "decay": True})
        free.append({"params": plain, "weight_decay": 0.0, "decay": False})
    return decayed + free
