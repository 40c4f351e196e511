from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastjepa.data.decoder import DecodeError
from fastjepa.data.media import decode_media, load_for_features


def test_an_image_stands_still_for_the_whole_clip(tmp_path: Path) -> None:
    Image.new("RGB", (30, 20), (1, 2, 3)).save(tmp_path / "a.png")
    clip = decode_media(str(tmp_path / "a.png"), "image", start_fraction=0.5, frames=4, fps=4.0)
    assert clip.shape == (4, 20, 30, 3)
    assert (clip == [1, 2, 3]).all()


def test_features_of_a_video_and_of_an_image(tmp_path: Path, write_video: Callable) -> None:
    video = write_video(tmp_path / "a.mp4", height=48, width=80)
    clip = load_for_features(str(video), 64, 8, 4.0)
    assert clip.shape == (3, 8, 64, 112)
    assert clip.dtype == torch.uint8
    later = load_for_features(str(video), 64, 2, 4.0, start_fraction=0.9)
    assert not torch.equal(later[:, 0], clip[:, 0])
    Image.new("RGBA", (100, 50), (9, 9, 9, 255)).save(tmp_path / "a.png")
    assert load_for_features(str(tmp_path / "a.png"), 56, 8, 4.0, patch=14).shape == (3, 1, 56, 112)


def test_the_kind_can_be_said_where_the_name_does_not(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "picture", format="png")
    path = str(tmp_path / "picture")
    assert load_for_features(path, 32, 8, 4.0, kind="image").shape == (3, 1, 32, 32)
    with pytest.raises(DecodeError, match="neither a video nor an image"):
        load_for_features(path, 32, 8, 4.0)
