"""A broken file is named and passed over, and no frame of it is ever anything but its own."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastjepa.data.cache import Cache
from fastjepa.data.decode_pyav import decode_clip
from fastjepa.data.decoder import DecodeError
from fastjepa.data.loader import Loader
from fastjepa.data.manifest import read_manifest
from fastjepa.data.probe import probe
from fastjepa.data.quarantine import Quarantine

from .breakage import DAMAGED, FLIPPED, HOPELESS
from .recipes import GOOD

FRACTIONS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.999)


@pytest.fixture(scope="session")
def broken(zoo: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """Path of a broken file by its name."""
    folder = tmp_path_factory.mktemp("broken")

    def make(name: str) -> Path:
        source, change = {**HOPELESS, **DAMAGED, **FLIPPED}[name]
        path = folder / name
        path.write_bytes(change(zoo(source).read_bytes()))
        return path

    return make


@pytest.mark.parametrize("name", HOPELESS)
def test_a_hopeless_file_is_one_clear_error(
    broken: Callable, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    path = broken(name)
    capfd.readouterr()
    for fraction in (0.0, 0.7):
        with pytest.raises(DecodeError) as caught:
            decode_clip(str(path), fraction, 4, 4.0)
        assert caught.value.path == str(path)
        assert caught.value.whole_file
        assert len(caught.value.reason) > 10
    assert capfd.readouterr() == ("", "")


def _clips(path: Path) -> list[np.ndarray | None]:
    """Clips from all over a file, None for each that it does not give."""
    clips: list[np.ndarray | None] = []
    for fraction in FRACTIONS:
        try:
            clips.append(decode_clip(str(path), fraction, 5, 8.0))
        except DecodeError:
            clips.append(None)
    return clips


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_gives_its_own_frames_or_an_error(
    broken: Callable, output_of: Callable, name: str
) -> None:
    """Never a frame in place of one that is lost, nor one made from it."""
    whole = output_of(DAMAGED[name][0]).frames
    numbers = {frame.tobytes(): number for number, frame in enumerate(whole)}
    clips = _clips(broken(name))
    for clip in clips:
        if clip is not None:
            found = [numbers.get(frame.tobytes(), -1) for frame in clip]
            assert -1 not in found
            # Half a second, 24 frames a second; the last frame may stay where the file ends.
            assert 9 <= found[-1] - found[0] <= 13
    cut = "end" in name or "beginning" in name
    assert any(clip is None for clip in clips) != cut


@pytest.mark.parametrize("name", FLIPPED)
def test_flipped_bits_are_an_error_or_a_clip(
    broken: Callable, output_of: Callable, name: str
) -> None:
    shape = (5, *output_of(FLIPPED[name][0]).frames.shape[1:])
    assert all(clip is None or clip.shape == shape for clip in _clips(broken(name)))


def test_a_run_over_good_and_broken_files_goes_on(
    zoo: Callable, broken: Callable, tmp_path: Path
) -> None:
    good = ("h264.mp4", "hevc.mp4", "vp9.webm", "mpeg4.avi", "open-gop.ts")
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in good:
        (folder / name).symlink_to(zoo(name))
    for name in HOPELESS:
        (folder / name).symlink_to(broken(name))
    loader = Loader(
        datasets=[(read_manifest(str(folder)), 1.0)],
        **{"batch": 4, "frames": 4, "fps": 4.0, "crop": 32, "seed": 0, "workers": 1},
        **{"scale": (0.3, 1.0), "aspect": (0.75, 1.35), "flip": 0.5, "max_bad_share": 0.9},
    )  # fmt: skip
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 0.9, loader.num_files)
    steps = 0
    for batch in loader.batches(0, 30):
        assert batch.clip.shape == (4, 3, 4, 32, 32)
        assert min(float(clip.float().std()) for clip in batch.clip) > 5.0
        quarantine.add(batch.bad)
        steps += 1
    loader.close()
    assert steps == 30
    rows = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").open()]
    assert {Path(row["path"]).name for row in rows} == set(HOPELESS)
    assert len(rows) == len(HOPELESS)
    assert all(row["reason"] for row in rows)


@pytest.mark.parametrize("name", HOPELESS)
def test_an_index_knows_a_hopeless_file(broken: Callable, tmp_path: Path, name: str) -> None:
    facts = probe(str(broken(name)), "video", Cache(tmp_path / "cache", 0))
    assert not facts.readable
    assert facts.reason


@pytest.mark.parametrize("name", sorted(GOOD))
def test_an_index_finds_a_good_file_readable(zoo: Callable, tmp_path: Path, name: str) -> None:
    facts = probe(str(zoo(name)), "video", Cache(tmp_path / "cache", 0))
    assert facts.readable, facts.reason
    assert facts.frames
