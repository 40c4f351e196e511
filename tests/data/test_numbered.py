"""A numbered picture says which it is after all that a video pipeline does to it, or not at all."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastjepa.data.augment import crop_resize_flip, normalise
from fastjepa.data.clip_plan import Box
from fastjepa.data.decode_pyav import decode_clip
from fastjepa.data.encode import encodable
from fastjepa.data.numbered import picture, read_number, write_numbered

NUMBERS = st.integers(0, 65535)
SIDES = st.integers(64, 300)


@given(NUMBERS, NUMBERS, SIDES, SIDES, st.integers(64, 300))
def test_resized_to_any_square(video: int, frame: int, height: int, width: int, size: int) -> None:
    drawn = picture(video, frame, height, width)
    assert drawn.shape == (height, width, 3)
    assert read_number(drawn) == (video, frame)
    square = crop_resize_flip(drawn[None], Box(0, 0, height, width), False, size)
    assert read_number(square[:, 0].permute(1, 2, 0).numpy()) == (video, frame)
    ready = normalise(square)[:, 0].permute(1, 2, 0).numpy()
    assert read_number(ready) == (video, frame)


@given(NUMBERS, NUMBERS, st.floats(0.3, 1.2), st.floats(-30, 30), st.integers(0, 2**32 - 1))
def test_darkened_and_noisy(video: int, frame: int, gain: float, shift: float, seed: int) -> None:
    drawn = picture(video, frame, 64, 96) * gain + shift
    noise = np.random.default_rng(seed).normal(0.0, 15.0, drawn.shape)
    assert read_number(np.clip(drawn + noise, 0, 255).astype(np.uint8)) == (video, frame)


@given(NUMBERS, NUMBERS, NUMBERS)
def test_what_is_no_picture_of_ours_has_no_number(video: int, frame: int, other: int) -> None:
    drawn = picture(video, frame, 96, 128)
    assert read_number(np.zeros_like(drawn)) is None
    assert read_number(drawn[:, ::-1]) is None
    assert read_number(drawn[::-1]) is None
    assert read_number(np.rot90(drawn)) is None
    assert read_number(drawn[24:, 32:]) is None
    # The upper half of one frame over the lower half of another, as broken decoders leave it.
    torn = np.concatenate([drawn[:48], picture(video, other, 96, 128)[48:]])
    assert read_number(torn) == ((video, frame) if other == frame else None)


@pytest.mark.parametrize("number", [(-1, 0), (0, 65536)])
def test_a_number_that_does_not_fit(number: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="expected 0 to 65535"):
        picture(*number, 64, 64)


@given(st.integers(0, 2**32 - 1))
def test_noise_has_no_number(seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
    assert read_number(noise) is None


@pytest.mark.parametrize("codec", encodable())
def test_every_frame_of_every_codec(tmp_path: Path, codec: str) -> None:
    video = write_numbered(tmp_path, 513, codec=codec, frames=40, fps=30.0, height=96, width=120)
    assert (video.number, video.codec, video.frames, video.fps) == (513, codec, 40, 30.0)
    clip = decode_clip(str(video.path), 0.0, 40, 30.0)
    assert [read_number(frame) for frame in clip] == [(513, frame) for frame in range(40)]
    small = torch.nn.functional.interpolate(
        torch.from_numpy(clip).permute(0, 3, 1, 2), (64, 64), mode="bilinear"
    )
    assert [read_number(f) for f in small.permute(0, 2, 3, 1).numpy()] == [
        (513, frame) for frame in range(40)
    ]
