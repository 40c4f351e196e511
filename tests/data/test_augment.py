import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from fastjepa.data.augment import as_pixels, crop_resize_flip, normalise, resize_for_features
from fastjepa.data.clip_plan import Box


def _frames(frames: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


@given(st.data(), st.integers(1, 90), st.integers(1, 90), st.integers(1, 64), st.booleans())
def test_crop_is_the_references_resize_to_within_rounding(
    data: st.DataObject, height: int, width: int, size: int, flip: bool
) -> None:
    """The reference crops and interpolates in float32; here bytes stay bytes."""
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    box = Box(
        top,
        left,
        data.draw(st.integers(1, height - top)),
        data.draw(st.integers(1, width - left)),
    )
    frames = _frames(2, height, width)
    clip = crop_resize_flip(frames, box, flip, size)
    assert clip.dtype == torch.uint8
    assert clip.shape == (3, 2, size, size)
    assert clip.is_contiguous()
    cut = torch.from_numpy(frames[:, top : top + box.height, left : left + box.width])
    exact = interpolate(
        cut.permute(0, 3, 1, 2).double(), (size, size), mode="bilinear", align_corners=False
    )
    exact = exact.flip(3) if flip else exact
    error = (clip.transpose(0, 1).double() - exact).abs()
    assert error.max() <= 1.01
    # Rows and columns are rounded one after the other; over many pixels that evens out.
    if error.numel() >= 500:
        assert error.mean() <= 0.5


def test_the_crop_is_the_same_in_every_frame() -> None:
    frames = np.repeat(_frames(1, 40, 50), 3, axis=0)
    clip = crop_resize_flip(frames, Box(3, 5, 30, 20), True, 16)
    assert (clip == clip[:, :1]).all()


def test_whole_picture_at_its_own_size_is_untouched() -> None:
    frames = _frames(2, 32, 32)
    clip = crop_resize_flip(frames, Box(0, 0, 32, 32), False, 32)
    assert (clip.permute(1, 2, 3, 0).numpy() == frames).all()


def test_normalise() -> None:
    clip = torch.from_numpy(_frames(2, 4, 4)).permute(3, 0, 1, 2)[None]
    out = normalise(clip)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1, 1)
    assert out.dtype == torch.float32
    assert torch.allclose(out, (clip / 255.0 - mean) / std, atol=1e-6)
    assert torch.equal(normalise(clip[0]), out[0])
    assert clip.dtype == torch.uint8


@given(st.integers(1, 300), st.integers(1, 300), st.integers(16, 96))
def test_features_keep_the_aspect_in_whole_patches(height: int, width: int, size: int) -> None:
    if max(height, width) > 8 * min(height, width):
        return
    clip = resize_for_features(_frames(1, height, width), size, 16)
    new_height, new_width = clip.shape[2:]
    assert new_height % 16 == new_width % 16 == 0
    assert abs(min(new_height, new_width) - size) <= 8
    scale = size / min(height, width)
    assert abs(new_height - height * scale) <= 8
    assert abs(new_width - width * scale) <= 8


def test_a_size_below_the_patch() -> None:
    with pytest.raises(ValueError, match="size is 8 pixels, expected at least one patch of 16"):
        resize_for_features(_frames(1, 20, 20), 8, 16)


def test_pixels_come_back_from_normalised_ones() -> None:
    clip = torch.arange(256, dtype=torch.uint8).repeat(3).view(3, 1, 16, 16)
    assert torch.equal(as_pixels(normalise(clip)), clip)
    assert as_pixels(clip) is clip
