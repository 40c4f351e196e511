"""Tokenizers: a tubelet of pixels to one token, computed only for the tokens that are asked for.

Shapes: B batch, T frames, H W pixels, N grid tokens, R rows, P = 3 t p p values of a patch, D
width.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from fastjepa.model.autocast import linear


class Tokenizer(nn.Module):
    """A convolution whose kernel is its stride, as a product over (gathered) patches.

    `proj` is the released Conv3d: kernel (tubelet, patch, patch), a tubelet of 1 for images.
    """

    def __init__(self, width: int, patch: int, tubelet: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, width, (tubelet, patch, patch), stride=(tubelet, patch, patch))
        # What an engine does to the patches: it may want the last word of a backward.
        self.gate: Callable[[Tensor], Tensor] | None = None

    def grid(self, clip: Tensor) -> tuple[int, int, int]:
        """Token grid (T', H', W') of a clip [B, 3, T, H, W]; ValueError if the sides do not
        divide."""
        kernel, sides = self.proj.kernel_size, clip.shape[2:]
        for name, side, step in zip(("frames", "height", "width"), sides, kernel, strict=True):
            if side % step or side == 0:
                raise ValueError(f"clip: {name} {side} is not a positive multiple of {step}")
        t, h, w = (side // step for side, step in zip(sides, kernel, strict=True))
        return t, h, w

    def forward(self, clip: Tensor, row_R: Tensor | None = None) -> Tensor:
        """Tokens of `clip` [B, 3, T, H, W]: rows `b * N + token` of `row_R`, or all [B * N, D]."""
        grid = self.grid(clip)
        (t, p, _) = self.proj.kernel_size
        tiles = (
            clip.unflatten(4, (grid[2], p)).unflatten(3, (grid[1], p)).unflatten(2, (grid[0], t))
        )
        tiles = tiles.permute(0, 2, 4, 6, 1, 3, 5, 7)
        if row_R is not None:
            patches_RP = tiles[_places(row_R, tiles.shape[:4])].flatten(1)
        else:
            patches_RP = tiles.flatten(4).flatten(0, 3)
        if self.gate is not None:
            patches_RP = self.gate(patches_RP)
        bias: Tensor = self.proj.bias  # type: ignore[assignment]
        return linear(patches_RP, self.proj.weight.flatten(1), bias)


def _places(row_R: Tensor, sides: Sequence[int]) -> tuple[Tensor, ...]:
    """Indices along each of `sides` of the rows that these flatten to.

    `torch.unravel_index` makes the host wait for the device, to look for negative rows.
    """
    places = []
    for side in reversed(sides[1:]):
        places.append(row_R % side)
        row_R = row_R // side
    return row_R, *reversed(places)
