"""From decoded frames to what the model sees: crop, resize, mirror, normalise. Nothing random."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fastjepa.data.clip_plan import Box
from fastjepa.data.decoder import Frame

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def crop_resize_flip(frames_THWC: Frame, box: Box, flip: bool, size: int) -> Tensor:
    """Cut one box out of every frame, resize it to a square, mirror it.

    Returns uint8 [3, T, size, size].
    `frames_THWC` uint8 [T, H, W, 3]. Bilinear without antialiasing, align_corners False (as the
    reference, `random_resized_crop`), in whole numbers: within 1 of the same in float32.
    """
    top, left, height, width = box
    cut = frames_THWC[:, top : top + height, left : left + width]
    return _resize(cut, size, size, antialias=False, flip=flip)


def resize_for_features(frames_THWC: Frame, size: int, patch: int) -> Tensor:
    """Resize, keeping the aspect, to uint8 [3, T, H, W]: short side `size`, sides whole patches.

    Bilinear with antialiasing, as the reference's evaluations resize. Raises ValueError for size <
    patch.
    """
    if not 0 < patch <= size:
        raise ValueError(f"size is {size} pixels, expected at least one patch of {patch}")
    height, width = frames_THWC.shape[1:3]
    scale = size / min(height, width)
    new_height, new_width = (
        max(1, int(side * scale / patch + 0.5)) * patch for side in (height, width)
    )
    return _resize(frames_THWC, new_height, new_width, antialias=True, flip=False)


def normalise(clip: Tensor) -> Tensor:
    """Bring uint8 [..., 3, T, H, W] to float32 by ImageNet's mean and deviation, on its device.

    A float32 clip is returned as it is: its decoder has done so.
    """
    if clip.is_floating_point():
        return clip
    mean = torch.tensor(IMAGENET_MEAN, device=clip.device).mul_(255.0).view(3, 1, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=clip.device).mul_(255.0).view(3, 1, 1, 1)
    return clip.to(torch.float32).sub_(mean).div_(std)


def as_pixels(clip: Tensor) -> Tensor:
    """Undo `normalise`: uint8 of the same shape and device; a uint8 clip is returned as it is."""
    if not clip.is_floating_point():
        return clip
    mean = torch.tensor(IMAGENET_MEAN, device=clip.device).view(3, 1, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=clip.device).view(3, 1, 1, 1)
    return ((clip * std + mean) * 255.0).round().clamp(0.0, 255.0).to(torch.uint8)


def _resize(frames_THWC: Frame, height: int, width: int, *, antialias: bool, flip: bool) -> Tensor:
    # Channels-last bytes take torch's vectorised path, ten times faster than float32.
    pixels_TCHW = torch.from_numpy(np.ascontiguousarray(frames_THWC)).permute(0, 3, 1, 2)
    resized_TCHW = interpolate(
        pixels_TCHW, (height, width), mode="bilinear", align_corners=False, antialias=antialias
    )
    # Its memory is channels last still; NumPy brings that to planes in half of torch's time.
    resized_CTHW = resized_TCHW.numpy().transpose(1, 0, 2, 3)
    return torch.from_numpy(resized_CTHW[..., :: -1 if flip else 1].copy(order="C"))
