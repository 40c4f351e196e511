"""Any media file to frames: videos by PyAV, images by Pillow. The loader's default decoder."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastjepa.data.augment import resize_for_features
from fastjepa.data.cache import DEFAULT, Cache
from fastjepa.data.decode_image import decode_image
from fastjepa.data.decode_pyav import decode_clip, decode_whole
from fastjepa.data.decoder import DecodeError, Frame, FrameTransform
from fastjepa.data.files import Kind, kind_of


def decode_media(
    path: str,
    kind: Kind,
    *,
    start_fraction: float,
    frames: int,
    fps: float,
    transform: FrameTransform | None = None,
    cache: Cache = DEFAULT,
) -> NDArray[Any]:
    """Read a clip of a video, or an image shown for the whole clip (see `ClipDecoder`)."""
    if kind == "image":
        return np.repeat(decode_image(path, transform, cache), frames, axis=0)
    return decode_clip(path, start_fraction, frames, fps, transform, cache)


def load_for_features(
    path: str,
    size: int,
    frames: int,
    fps: float,
    *,
    patch: int = 16,
    start_fraction: float = 0.0,
    kind: Kind | None = None,
) -> Tensor:
    """Read a file for feature extraction: uint8 [3, T, H, W], the whole picture, uncropped.

    The short side becomes `size` pixels. T is `frames` for a video and 1 for an image; H and W are
    multiples of `patch`. `kind` is told by the extension when not given. Raises DecodeError for a
    file that cannot be read.
    """
    kind = kind or _kind(path)
    count = 1 if kind == "image" else frames
    clip = decode_media(
        path, kind, start_fraction=start_fraction, frames=count, fps=fps,
        transform=_fitted(size, patch),
    )  # fmt: skip
    return torch.from_numpy(clip).transpose(0, 1).contiguous()


def stream_for_features(
    path: str, size: int, fps: float, *, patch: int = 16
) -> Iterator[NDArray[Any]]:
    """All of a video, 1/fps s apart, or an image: uint8 [3, H, W] each, as `load_for_features`.

    Raises DecodeError, perhaps after some pictures.
    """
    if _kind(path) == "image":
        yield decode_image(path, _fitted(size, patch))[0]
    else:
        yield from decode_whole(path, fps, _fitted(size, patch))


def _kind(path: str) -> Kind:
    kind = kind_of(path)
    if kind is None:
        raise DecodeError(path, "neither a video nor an image by its extension", whole_file=True)
    return kind


def _fitted(size: int, patch: int) -> FrameTransform:
    def fit(frame: Frame) -> NDArray[Any]:
        fitted: NDArray[Any] = resize_for_features(frame[None], size, patch)[:, 0].numpy()
        return fitted

    return fit
