"""Dense features as colours: three principal components to red, green and blue, beside the pixels.

Shapes: T frames or T' feature steps, H and W pixels or H' and W' grid cells, D channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_INK = (60, 60, 60)
_PAPER = (255, 255, 255)
_GAP = 6
_TEXT = 13


@dataclass(frozen=True)
class Palette:
    """A map from features to colours: mean and axes of the components, and what is black and
    full."""

    mean_D: Tensor
    axes_D3: Tensor
    low_3: Tensor
    high_3: Tensor

    @classmethod
    def fit(cls, *features: Tensor, trim: float = 0.01) -> "Palette":
        """Principal components over all tokens of all `features` (each of any shape ending in D).

        Each component spans its colour from its `trim` to its 1 - `trim` quantile, so that a few
        odd tokens do not wash out the rest. Its sign is the one that makes its largest weight
        positive. Computed in float64. Raises ValueError when there is no token, when widths
        differ, or when a feature is not finite.
        """
        widths = {f.shape[-1] for f in features}
        if len(widths) != 1 or not all(f.numel() for f in features):
            raise ValueError(
                "palette: expected features of one width, found "
                f"{[tuple(f.shape) for f in features]}"
            )
        x_ND = torch.cat([f.detach().cpu().flatten(0, -2).double() for f in features])
        if not x_ND.isfinite().all():
            raise ValueError("palette: the features hold NaN or infinite values")
        mean_D = x_ND.mean(0)
        centred_ND = x_ND - mean_D
        axes_DK = torch.linalg.eigh(centred_ND.T @ centred_ND).eigenvectors.flip(1)[:, :3]
        largest = axes_DK.gather(0, axes_DK.abs().argmax(0, keepdim=True))
        axes_D3 = torch.zeros(len(mean_D), 3, dtype=torch.float64)
        axes_D3[:, : axes_DK.shape[1]] = axes_DK * largest.sign()
        sorted_N3 = (centred_ND @ axes_D3).sort(0).values
        last = len(sorted_N3) - 1
        low_3, high_3 = sorted_N3[round(trim * last)], sorted_N3[round((1 - trim) * last)]
        # Rounding error is no structure: leave it grey.
        noise = 1e-5 * x_ND.square().mean().sqrt() * len(mean_D) ** 0.5
        flat_3 = high_3 - low_3 <= noise
        low_3 = torch.where(flat_3, -1e30, low_3)
        high_3 = torch.where(flat_3, 1e30, high_3)
        return cls(mean_D, axes_D3, low_3, high_3)

    def colours(self, features: Tensor) -> Tensor:
        """Colours of features `[..., D]` as uint8 `[..., 3]`; features without variation are
        mid-grey.

        Raises ValueError when the width is not the palette's.
        """
        if features.shape[-1] != len(self.mean_D):
            raise ValueError(
                f"palette: made for width {len(self.mean_D)}, got features {tuple(features.shape)}"
            )
        place = (features.detach().cpu().double() - self.mean_D) @ self.axes_D3
        share = ((place - self.low_3) / (self.high_3 - self.low_3)).clamp(0.0, 1.0)
        return (share * 255).round().to(torch.uint8)


def colour_spread(colours: Tensor) -> float:
    """How far colours uint8 `[..., 3]` spread: standard deviation of each channel, averaged, in
    0..0.5.

    0 is one uniform colour; evenly used channels give 0.29.
    """
    return (colours.flatten(0, -2).double() / 255).std(0, correction=0).mean().item()


def picture(
    clip_u8_3THW: Tensor,
    features_THWD: Tensor | Mapping[str, Tensor],
    *,
    palette: Palette | None = None,
    title: str = "",
    cell: int = 160,
    columns: int = 8,
) -> Image.Image:
    """A strip of a clip's frames with the colours of their features underneath, step by step.

    Takes uint8 RGB `[3, T, H, W]` (an image is T = 1) and features `[T', H', W', D]`, T a
    multiple of T', or several of one grid by name, a row of colours for each. Of more than
    `columns` steps, evenly spaced ones are shown, each with its first frame. `cell` is about the
    longer side of a frame in pixels, rounded so that every grid cell is a whole square. Without
    `palette` each row gets its own. Raises ValueError on other shapes or dtypes.
    """
    named = features_THWD if isinstance(features_THWD, Mapping) else {"": features_THWD}
    if clip_u8_3THW.ndim != 4 or clip_u8_3THW.shape[0] != 3 or clip_u8_3THW.dtype != torch.uint8:
        raise ValueError(
            f"picture: expected a clip uint8 [3, T, H, W], found {clip_u8_3THW.dtype} "
            f"{tuple(clip_u8_3THW.shape)}"
        )
    frames = clip_u8_3THW.shape[1]
    grids = {x.shape[:3] for x in named.values()}
    if len(grids) != 1 or any(x.ndim != 4 or frames % x.shape[0] for x in named.values()):
        raise ValueError(
            f"picture: expected features [T', H', W', D] whose T' divides {frames} frames, found "
            f"{', '.join(str(tuple(x.shape)) for x in named.values())}"
        )
    ((steps, rows, cols),) = grids
    stride = frames // steps
    colours_THW3 = [(palette or Palette.fit(x)).colours(x) for x in named.values()]
    scale = max(1, round(cell / max(rows, cols)))
    size = (cols * scale, rows * scale)
    shown = _evenly(steps, columns)

    font = ImageFont.load_default(_TEXT)
    head = _TEXT + 2 * _GAP if title else _GAP
    aside = max(round(font.getlength(name)) + _GAP if name else 0 for name in named)
    width = aside + _GAP + len(shown) * (size[0] + _GAP)
    height = head + (1 + len(named)) * (size[1] + _GAP) + _TEXT + _GAP
    canvas = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((_GAP, _GAP), title, fill=_INK, font=font)
    for column, step in enumerate(shown):
        left = aside + _GAP + column * (size[0] + _GAP)
        frame = clip_u8_3THW[:, step * stride].permute(1, 2, 0).cpu().numpy()
        canvas.paste(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS), (left, head))
        below = head
        for colours in colours_THW3:
            below += size[1] + _GAP
            grid = Image.fromarray(colours[step].numpy())
            canvas.paste(grid.resize(size, Image.Resampling.NEAREST), (left, below))
        caption = "image" if frames == 1 else f"frame {step * stride}"
        draw.text((left, below + size[1] + 2), caption, fill=_INK, font=font)
    for number, name in enumerate(named, start=1):
        middle = head + number * (size[1] + _GAP) + (size[1] - _TEXT) // 2
        draw.text((_GAP, middle), name, fill=_INK, font=font)
    return canvas


def sheet(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures on one white sheet as wide as the widest, each beside the last where it fits.

    Raises ValueError when there is none.
    """
    if not pictures:
        raise ValueError("sheet: expected at least one picture")
    width = max(p.width for p in pictures)
    places, left, top, below = [], 0, 0, 0
    for one in pictures:
        if left + one.width > width:
            left, top = 0, below
        places.append((left, top))
        left, below = left + one.width, max(below, top + one.height)
    canvas = Image.new("RGB", (width, below), _PAPER)
    for one, place in zip(pictures, places, strict=True):
        canvas.paste(one, place)
    return canvas


def _evenly(count: int, at_most: int) -> list[int]:
    shown = min(count, at_most)
    return [i * count // shown for i in range(shown)]
