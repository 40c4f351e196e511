"""Features kept on disk: equal to those taken directly, taken once, of a changed file anew."""

import os
from pathlib import Path

import pytest
import torch

from fastjepa.data.augment import normalise
from fastjepa.data.media import load_for_features
from fastjepa.model import Encoder
from fastjepa.pretrained import load
from fastjepa.probes.feature_store import SHARD, FeatureStore, View, weights_digest

VIEW = View(level=2, size=32, frames=2, fps=8.0)


@pytest.fixture
def encoder(weights: Path) -> Encoder:
    return load(weights)


def store(folder: Path, paths: list[str], view: View, encoder: Encoder) -> FeatureStore:
    made = FeatureStore(folder, paths, view, weights_digest(encoder))
    made.fill(encoder, batch=3)
    return made


def test_segments_lie_evenly_and_follow_one_another(
    videos: Path, encoder: Encoder, tmp_path: Path
) -> None:
    path = str(videos / "train0.mp4")
    view = View(level=2, size=32, frames=2, fps=8.0, segments=2)
    found = store(tmp_path, [path], view, encoder)[0]
    clips = [load_for_features(path, 32, 2, 8.0, patch=8, start_fraction=f) for f in (0.25, 0.75)]
    expected = [encoder.features(normalise(clip)[None], [2])[0][0] for clip in clips]
    torch.testing.assert_close(found, torch.cat(expected))
    pooled = View(level=2, size=32, frames=2, fps=8.0, segments=2, pool=True)
    mean = torch.cat(expected).mean((0, 1, 2), keepdim=True)
    torch.testing.assert_close(store(tmp_path, [path], pooled, encoder)[0], mean)


def test_a_square_is_the_middle(dense: Path, encoder: Encoder, tmp_path: Path) -> None:
    path = str(dense / "train/images/0.png")  # 32 high, 24 wide
    whole = store(tmp_path, [path], VIEW, encoder)[0]
    square = store(tmp_path, [path], View(level=2, size=32, frames=2, square=True), encoder)[0]
    assert whole.shape == (1, 5, 4, 48)
    assert square.shape == (1, 4, 4, 48)


def test_what_is_there_is_not_taken_again(classes: Path, encoder: Encoder, tmp_path: Path) -> None:
    paths = sorted(map(str, (classes / "test").rglob("*.png")))[: SHARD + 3]
    first = store(tmp_path, paths, VIEW, encoder)
    files = sorted((tmp_path / first.name).iterdir())
    assert len(files) == 2
    before = [file.stat().st_mtime_ns for file in files]
    files[1].unlink()
    done: list[int] = []
    again = FeatureStore(tmp_path, paths, VIEW, weights_digest(encoder))
    again.fill(encoder, batch=3, advance=done.append)
    assert done == [SHARD, 3]
    assert files[0].stat().st_mtime_ns == before[0]
    for number in range(len(paths)):
        torch.testing.assert_close(again[number], first[number])
    assert not [name for name in os.listdir(tmp_path / first.name) if name.startswith(".")]


def test_other_weights_views_and_files_go_elsewhere(
    classes: Path, encoder: Encoder, tmp_path: Path
) -> None:
    path = tmp_path / "one.png"
    path.write_bytes(next((classes / "test").rglob("*.png")).read_bytes())

    def name(view: View = VIEW, digest: str = "a") -> str:
        return FeatureStore(tmp_path, [str(path)], view, digest).name

    names = {name(), name(digest="b"), name(View(level=1, size=32, frames=2, fps=8.0))}
    os.utime(path, ns=(1, 1))
    assert len(names | {name()}) == 4
    digest = weights_digest(encoder)
    with torch.no_grad():
        next(encoder.parameters()).flatten()[0].add_(1.0)
    assert weights_digest(encoder) != digest


def test_a_file_that_cannot_be_read_is_left_out_and_named(
    classes: Path, encoder: Encoder, tmp_path: Path
) -> None:
    good = str(next((classes / "test").rglob("*.png")))
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    for _ in range(2):  # also when the features come from the disk
        found = store(tmp_path / "features", [str(broken), good], VIEW, encoder)
        assert found.good == [1]
        assert "broken.png" in found.bad[0]


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (View(level=0, size=32), r"level: expected one of \[1, 2\], got 0"),
        (View(level=2, size=30), "size: 30 is no multiple of the patch 8"),
        (View(level=2, size=32, frames=3), "frames: 3 is no multiple of the tubelet 2"),
        (View(level=2, size=32, segments=0), "segments: expected at least 1, got 0"),
    ],
)
def test_a_view_that_cannot_be_is_refused(view: View, message: str, encoder: Encoder) -> None:
    with pytest.raises(ValueError, match=message):
        view.check(encoder)
