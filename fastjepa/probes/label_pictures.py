"""Label pictures: a class or a depth for every pixel, from PNG or NumPy files."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor


def read_mask(path: str) -> Tensor:
    """Classes int64 [H, W] of a palette or grey picture or an `.npy` of integers.

    Raises ValueError naming the file that is none.
    """
    array = _read(path)
    if not np.issubdtype(array.dtype, np.integer) and array.dtype != np.bool_:
        raise ValueError(f"{path}: expected whole numbers as classes, found {array.dtype}")
    return torch.from_numpy(array.astype(np.int64))


def read_depth(path: str, unit: float) -> Tensor:
    """Metres float32 [H, W], 0 where unknown, of a grey picture or an `.npy`.

    `unit` metres are 1 in a picture (0.001 for millimetres); an `.npy` holds metres. Raises
    ValueError naming the file that is none.
    """
    scale = 1.0 if Path(path).suffix == ".npy" else unit
    metres = torch.from_numpy(_read(path).astype(np.float32)) * scale
    return metres.nan_to_num(0.0, 0.0, 0.0)


def _read(path: str) -> NDArray[np.generic]:
    try:
        if Path(path).suffix == ".npy":
            array: NDArray[np.generic] = np.load(path, allow_pickle=False)
        else:
            with Image.open(path) as picture:
                array = np.array(picture)
    except (OSError, ValueError, EOFError, SyntaxError, UnidentifiedImageError) as error:
        raise ValueError(f"{path}: cannot be read as a label picture: {error}") from None
    if array.ndim != 2:
        raise ValueError(
            f"{path}: expected one number a pixel [H, W], found {tuple(array.shape)}; "
            "a palette or grey picture fits"
        )
    return array
