"""Batches are pure in the step: the same for any workers, restarts and order of asking."""

import hashlib
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastjepa.data.batch import Batch, BatchSource
from fastjepa.data.cache import Cache
from fastjepa.data.files import Entry
from fastjepa.data.loader import Loader
from fastjepa.data.manifest import read_manifest
from fastjepa.data.media import decode_media
from fastjepa.data.quarantine import Quarantine, TooManyBadFiles


def _loader(folder: Path, **changes: Any) -> Loader:
    arguments: dict[str, Any] = {
        "datasets": [(read_manifest(str(folder)), 1.0)],
        "batch": 3,
        "frames": 4,
        "fps": 4.0,
        "crop": 32,
        "scale": (0.3, 1.0),
        "aspect": (0.75, 1.35),
        "flip": 0.5,
        "seed": 5,
        "extras": partial(np.full, 3),
    }
    return Loader(**{**arguments, **changes})


def _digest(batch: Batch) -> tuple[int, str, list[int], list[tuple[str, str]]]:
    clip = hashlib.sha256(batch.clip.numpy().tobytes()).hexdigest()
    return batch.step, clip, batch.extras.tolist(), batch.bad


def _digests(loader: Loader, start: int, stop: int) -> list[tuple]:
    digests = [_digest(batch) for batch in loader.batches(start, stop)]
    loader.close()
    return digests


@pytest.fixture
def mixed(clips: Path, tmp_path: Path) -> Path:
    """Four good videos and two bad ones."""
    for clip in sorted(clips.iterdir())[:4]:
        (tmp_path / clip.name).symlink_to(clip)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(1).bytes(5000))
    return tmp_path


def test_a_batch(clips: Path) -> None:
    source: BatchSource = _loader(clips)
    batches = list(source.batches(7, 9))
    assert [batch.step for batch in batches] == [7, 8]
    assert batches[0].clip.shape == (3, 3, 4, 32, 32)
    assert batches[0].clip.dtype == torch.uint8
    assert batches[0].extras.tolist() == [7, 7, 7]
    assert batches[0].bad == []
    source.close()


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 9), st.integers(0, 9))
def test_a_restart_goes_on_with_the_very_next_batch(mixed: Path, start: int, length: int) -> None:
    straight = _digests(_loader(mixed), 0, start + length)
    assert _digests(_loader(mixed), start, start + length) == straight[start:]


def test_any_number_of_workers_gives_the_same_bytes(mixed: Path) -> None:
    """Bad files among them: what is drawn in their place depends on the sample alone."""
    in_process = _digests(_loader(mixed), 0, 10)
    assert any(bad for *_, bad in in_process)
    random = torch.get_rng_state()
    assert _digests(_loader(mixed, workers=1), 0, 10) == in_process
    assert _digests(_loader(mixed, workers=2, prefetch=3), 0, 10) == in_process
    assert _digests(_loader(mixed, workers=2), 4, 10) == in_process[4:]
    assert torch.equal(torch.get_rng_state(), random)


def test_ranks_share_the_samples_of_one_rank(clips: Path) -> None:
    alone = [batch.clip for batch in _loader(clips, batch=4).batches(0, 3)]
    parts = [
        [batch.clip for batch in _loader(clips, batch=2, rank=rank, ranks=2).batches(0, 3)]
        for rank in (0, 1)
    ]
    for step in range(3):
        assert torch.equal(torch.cat([parts[0][step], parts[1][step]]), alone[step])


def test_seed_and_stream_change_the_clips(clips: Path) -> None:
    digests = {
        _digests(_loader(clips, seed=seed, stream=stream), 0, 1)[0][1]
        for seed in (0, 1)
        for stream in (0, 1)
    }
    assert len(digests) == 4


def test_images_are_batches_of_one_frame(clips: Path) -> None:
    entries = read_manifest("package:sklearn/datasets/images")
    (batch,) = _loader(clips, datasets=[(entries, 1.0)], frames=1).batches(0, 1)
    assert batch.clip.shape == (3, 3, 1, 32, 32)


def test_flip_and_crop_come_from_the_plan(clips: Path) -> None:
    still = {"scale": (1.0, 1.0), "aspect": (4 / 3, 4 / 3), "batch": 8}
    plain = next(_loader(clips, flip=0.0, **still).batches(0, 1)).clip
    mirrored = next(_loader(clips, flip=1.0, **still).batches(0, 1)).clip
    assert torch.equal(mirrored, plain.flip(4))


def test_data_sets_are_mixed_by_weight(clips: Path) -> None:
    seen: list[str] = []

    def decoder(path: str, kind: str, *, frames: int, transform: Callable, **_: Any) -> np.ndarray:
        seen.append(path)
        return np.stack([transform(np.zeros((8, 8, 3), np.uint8))] * frames)

    data = [([Entry("/a", "video")], 0.2), ([Entry(f"/b{i}", "video") for i in range(3)], 0.8)]
    loader = _loader(clips, datasets=data, batch=1000, decoder=decoder, crop=1)
    next(loader.batches(0, 1))
    assert abs(seen.count("/a") / 1000 - 0.2) < 0.04
    assert abs(seen.count("/b1") / 1000 - 0.8 / 3) < 0.04


def test_a_bad_file_is_replaced_named_and_counted(mixed: Path, tmp_path: Path) -> None:
    loader = _loader(mixed, max_bad_share=0.5)
    quarantine = Quarantine(mixed / "quarantine.jsonl", 0.5, loader.num_files)
    for batch in loader.batches(0, 12):
        assert batch.clip.shape[0] == 3
        quarantine.add(batch.bad)
    text = (mixed / "quarantine.jsonl").read_text()
    assert text.count("\n") == len(quarantine) == 2
    assert "empty.mp4" in text
    assert "the file is empty" in text


def test_a_missing_file_is_a_bad_file(clips: Path) -> None:
    data = [(read_manifest(str(clips)), 0.5), ([Entry("/nowhere/x.mp4", "video")], 0.5)]
    bad = {file for batch in _loader(clips, datasets=data).batches(0, 4) for file in batch.bad}
    assert bad == {("/nowhere/x.mp4", "cannot be opened (No such file or directory)")}


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_files_stop_after_the_batch_that_shows_it(mixed: Path, workers: int) -> None:
    seen: list[Batch] = []
    message = r"2 of 6 files cannot be read, above max_bad_share 0\.2"
    with pytest.raises(TooManyBadFiles, match=message) as caught:
        seen.extend(_loader(mixed, max_bad_share=0.2, workers=workers).batches(0, 100))
    assert {path for batch in seen for path, _ in batch.bad} == {
        str(mixed / "empty.mp4"),
        str(mixed / "noise.mp4"),
    }
    assert set(caught.value.bad) <= set(seen[-1].bad)


@pytest.mark.parametrize("workers", [0, 1])
def test_no_good_file_at_all(tmp_path: Path, workers: int) -> None:
    for name in ("a.mp4", "b.mp4", "c.jpg"):
        (tmp_path / name).touch()
    loader = _loader(tmp_path, max_bad_share=1.0, workers=workers)
    with pytest.raises(TooManyBadFiles, match="no readable file was found for sample 0") as caught:
        next(loader.batches(0, 1))
    assert "\n" not in str(caught.value)
    assert {Path(path).name for path, _ in caught.value.bad} == {"a.mp4", "b.mp4", "c.jpg"}


@pytest.mark.parametrize("workers", [0, 1])
def test_no_steps_give_no_batches(clips: Path, workers: int) -> None:
    assert list(_loader(clips, workers=workers).batches(4, 4)) == []


def test_batches_can_be_left_early_and_asked_for_again(clips: Path) -> None:
    loader = _loader(clips)
    first = next(loader.batches(3, 100))
    loader.close()
    again = next(loader.batches(3, 100))
    assert torch.equal(first.clip, again.clip)
    loader.close()
    loader.close()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"frames": 0}, "frames is 0"),
        ({"fps": 0.0}, "fps is 0.0"),
        ({"crop": -1}, "crop is -1"),
        ({"workers": -1}, "workers is -1"),
        ({"prefetch": 0}, "prefetch is 0"),
        ({"rank": 2, "ranks": 2}, "rank is 2, expected 0 to ranks - 1 = 1"),
        ({"scale": (0.9, 0.3)}, "scale is"),
        ({"scale": (0.0, 0.3)}, "scale is"),
        ({"aspect": (2.0, 1.0)}, "aspect is"),
        ({"seed": -1}, "seed is -1"),
        ({"max_bad_share": 2.0}, "max_bad_share is 2.0"),
        ({"datasets": []}, "none given"),
    ],
)
def test_arguments_that_cannot_be(clips: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        _loader(clips, **changes)


def test_shards_and_stores_give_the_batches_of_the_files(clips: Path, tmp_path: Path) -> None:
    """Also in workers, which list a shard and fetch from a store by themselves."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for clip in sorted(clips.iterdir()):
            tar.add(clip, clip.name)
    cache = Cache(tmp_path / "cache", 10**7)
    alone = [digest[1] for digest in _digests(_loader(clips), 0, 4)]
    for manifest in (f"{tmp_path}/a.tar", f"file://{clips}", f"file://{tmp_path}/*.tar"):
        data = [(read_manifest(manifest, cache), 1.0)]
        decoder = partial(decode_media, cache=cache)
        for workers in (0, 2):
            loader = _loader(clips, datasets=data, decoder=decoder, workers=workers)
            assert [digest[1] for digest in _digests(loader, 0, 4)] == alone
