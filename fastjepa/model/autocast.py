"""What autocast makes of products, for forwards that are written by hand."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastjepa_kernels.precision import as_multiplied


def product_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype on x's device, or x's own without autocast."""
    kind = x.device.type
    # Tensors without data know no autocast.
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if autocast else x.dtype


def linear(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    """`x W^T + b` as autocast has it, [R, O]: where a processor is slow in its dtype, the product
    of the same numbers in a wider one."""
    dtype = product_dtype(x_RI)
    x = x_RI.to(dtype)
    fast = as_multiplied(x)
    if fast is x:
        return F.linear(x, weight_OI, bias_O)
    with torch.autocast(x.device.type, enabled=False):
        weight, bias = (t.to(dtype).to(fast.dtype) for t in (weight_OI, bias_O))
        return F.linear(fast, weight, bias).to(dtype)


class Linear(nn.Linear):
    """`linear` with its weights."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
