"""What a forward has saved, in the hands of its backward."""

import torch
from torch import Tensor


def needed_again(saved: Tensor) -> bool:
    """Whether the backward that runs must leave `saved` as it is, for another one of the same graph
    (`retain_graph`, `create_graph`)."""
    # Tracers run backwards with tensors of their own, and see no writes into what has been saved.
    if torch.compiler.is_compiling() or type(saved) is not Tensor:
        return True
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())
