"""Products of float8 numbers with a scale for each row: the target encoder's, if asked for.

A row of the input and a row of the weight are each divided by their largest size over 448, rounded
to float8 (e4m3: 3 bits behind the point), multiplied with float32 sums, and scaled back. Weights
are rounded anew in every pass, for the moving average moves in every step. On a GPU rounding is one
pass over the rows, and the product is `torch._scaled_mm`; elsewhere it is one of the same rounded
numbers in float32, no faster, for tests and for measuring what the rounding does.

Shapes: R rows, I input width, O output width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastjepa.model.autocast import product_dtype
from fastjepa_kernels.block_passes.op import float8_rows

# Widths that the GPU's product takes.
_STEP = 16


class Float8Linear(nn.Linear):
    """A Linear layer whose forward is in float8. It gives no gradient."""

    def forward(self, input: Tensor) -> Tensor:
        """[R, I] -> [R, O], in autocast's dtype, or in that of the input without autocast."""
        return self._multiplied(input, self.bias)

    def product(self, input: Tensor) -> Tensor:
        """`forward` without the bias."""
        return self._multiplied(input, None)

    @torch.no_grad()
    def _multiplied(self, input: Tensor, bias: Tensor | None) -> Tensor:
        kind, dtype = input.device.type, product_dtype(input)
        x_RI, scale_R1 = float8_rows(input)
        weight_OI, scale_O1 = float8_rows(self.weight)
        if kind == "cuda":
            out_RO = torch._scaled_mm(
                x_RI, weight_OI.t(), scale_a=scale_R1, scale_b=scale_O1.t(),
                bias=None if bias is None else bias.bfloat16(), out_dtype=torch.bfloat16,
            )  # fmt: skip
            return out_RO.to(dtype)
        with torch.autocast(kind, enabled=False):
            out_RO = F.linear(x_RI.float(), weight_OI.float()) * scale_R1 * scale_O1.t()
            return (out_RO if bias is None else out_RO + bias).to(dtype)


def target_linear(dtype: str | None, device: torch.device, *widths: int) -> type[nn.Linear]:
    """The class of a target encoder's products in `dtype`: `float8`, or None for plain ones.

    Raises ValueError where a GPU cannot multiply float8 numbers of these widths.
    """
    if dtype is None:
        return nn.Linear
    refusal = _refusal(device, widths)
    if refusal is not None:
        raise ValueError(f"engine.target_dtype: {dtype} cannot run here: {refusal}; null fits")
    return Float8Linear


def _refusal(device: torch.device, widths: Sequence[int]) -> str | None:
    if device.type != "cuda":
        return None
    if torch.cuda.get_device_capability(device) < (8, 9):
        return "it needs a GPU of compute capability 8.9 or more"
    wrong = [width for width in widths if width % _STEP]
    return f"widths must be multiples of {_STEP}, not {wrong[0]}" if wrong else None
