"""The dtype that autocast gives to products, for forwards that are written by hand."""

import torch
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype on x's device, or x's own without autocast."""
    kind = x.device.type
    # Tensors without data know no autocast.
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if autocast else x.dtype
