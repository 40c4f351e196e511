"""Images by Pillow: upright, RGB, 8 bits."""

import struct
import warnings
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fastjepa.data.cache import DEFAULT, Cache
from fastjepa.data.decoder import DecodeError, Frame, FrameTransform, check_size
from fastjepa.data.storage import open_media

# What Pillow's readers raise for broken files, besides OSError (which holds
# UnidentifiedImageError).
_PILLOW_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def decode_image(
    path: str, transform: FrameTransform | None = None, cache: Cache = DEFAULT
) -> NDArray[Any]:
    """Read an image as a clip of one frame: uint8 [1, H, W, 3], or `transform` of it, stacked.

    EXIF orientation is applied, transparency laid over white, 16-bit grey brought to 8 bits by its
    high byte. Raises DecodeError for a file that is missing, broken, too large (checked before
    decoding), or of 32-bit pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open_media(path, cache) as media, Image.open(media) as image:
                check_size(path, image.height, image.width)
                frame = _to_rgb(path, ImageOps.exif_transpose(image))
    except DecodeError:
        raise
    except _PILLOW_ERRORS as error:
        raise DecodeError(path, _reason(error), whole_file=True) from None
    return np.stack([frame if transform is None else transform(frame)])


def _to_rgb(path: str, image: Image.Image) -> Frame:
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        reason = f"32-bit pixels (mode {image.mode}), whose range is not known"
        raise DecodeError(path, reason, whole_file=True)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.array(image.convert("RGB"))


def _reason(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    if text.startswith("cannot identify image file"):
        text = "not an image"
    return f"cannot be decoded ({text or type(error).__name__})"
