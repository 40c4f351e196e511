"""A video of dense features as colours beside the pixels, one palette for all of its frames.

Shapes: T' feature steps, H and W pixels, H' and W' grid cells, D channels.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastjepa.data.encode import write_video
from fastjepa.features.pca import Palette

# Tokens that the palette is fitted on, evenly taken from the video: it changes little with more.
_TOKENS = 50_000


def write_pca_video(
    path: Path,
    pictures: Iterable[NDArray[np.uint8]],
    features_THWD: Tensor,
    *,
    fps: float,
    tubelet: int,
    palette: Palette | None = None,
) -> Path:
    """Write an H.264 `.mp4`: left the pictures uint8 [3, H, W], right their features' colours.

    The palette, fitted on the whole video unless one is given, is the same for every frame, so that
    a thing keeps its colour over time. `tubelet` pictures share a feature step. `path` holds the
    whole video or is not touched. Raises ValueError when there is no picture.
    """
    tokens_ND = features_THWD.flatten(0, 2)
    chosen = palette or Palette.fit(tokens_ND[:: 1 + len(tokens_ND) // _TOKENS])

    def frames() -> Iterator[NDArray[np.uint8]]:
        last, shown = -1, np.empty(0, np.uint8)
        for number, picture in enumerate(pictures):
            step = min(number // tubelet, len(features_THWD) - 1)
            if step != last:
                colours = chosen.colours(features_THWD[step])
                size = picture.shape[2], picture.shape[1]
                cells = Image.fromarray(colours.numpy()).resize(size, Image.Resampling.NEAREST)
                last, shown = step, np.asarray(cells)
            both = np.concatenate((picture.transpose(1, 2, 0), shown), axis=1)
            # The codec stores colour for 2 x 2 pixels.
            yield np.ascontiguousarray(both[: both.shape[0] // 2 * 2, : both.shape[1] // 2 * 2])

    return write_video(path, frames(), "h264", fps=fps)
