"""Moving digits as files: frames and labels agree, and the bytes do not depend on the workers."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fastjepa import cli
from fastjepa.data.decode_pyav import decode_clip
from fastjepa.data.decoder import Frame
from fastjepa.data.encode import encodable, write_video
from fastjepa.data.manifest import read_manifest
from fastjepa.data.moving_digits import MovingDigits
from fastjepa.data.write_digits import write_digits

SOURCE = MovingDigits(frames=10, height=64, width=80, fps=10.0)


def _bytes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "new"
    assert len(list(write_digits(folder, SOURCE, 5))) == 5
    return folder


def test_videos_show_the_clips_and_labels_are_theirs(written: Path) -> None:
    entries = read_manifest(str(written / "manifest.csv"))
    assert [Path(entry.path).name for entry in entries] == [f"00000{i}.mp4" for i in range(5)]
    for number, entry in enumerate(entries):
        clip = SOURCE[number]
        shown = decode_clip(entry.path, 0.0, 10, 10.0)
        assert np.abs(shown.astype(int) - clip.frames).mean() < 6.0
        with np.load(Path(entry.path).with_suffix(".npz")) as labels:
            assert float(labels["fps"]) == 10.0
            for name in ("mask", "instance", "digits", "images", "positions", "velocities"):
                assert np.array_equal(labels[name], getattr(clip, name))


@pytest.mark.parametrize("codec", ["h264", "hevc", "mpeg4"])
def test_what_lay_in_memory_does_not_change_the_bytes(codec: str, tmp_path: Path) -> None:
    if codec not in encodable():
        pytest.skip(f"this PyAV does not encode {codec}")
    random = np.random.default_rng(0)

    def pictures() -> Iterator[Frame]:
        for picture in SOURCE[4].frames:
            left = [
                random.integers(0, 255, size, np.uint8) for size in random.integers(1, 40000, 6)
            ]
            del left
            yield picture

    found = set()
    for number in range(20):
        path = write_video(tmp_path / f"{number}.mp4", pictures(), codec, fps=10.0)
        found.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(found) == 1


def test_any_number_of_workers_writes_the_same_bytes(written: Path, tmp_path: Path) -> None:
    list(write_digits(tmp_path / "again", SOURCE, 5, workers=2))
    assert _bytes(tmp_path / "again") == _bytes(written)


def test_a_folder_that_is_not_whole_is_written_again(written: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    started = write_digits(folder, SOURCE, 5)
    next(started)
    started.close()
    assert not (folder / "manifest.csv").exists()
    list(write_digits(folder, SOURCE, 5))
    assert _bytes(folder) == _bytes(written)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "digits"
    small = ["--frames", "4", "--height", "32", "--width", "48", "--workers", "1"]
    command = ["synth", "moving-digits", str(out), "--count", "2", "--codec", "mpeg4", *small]
    with pytest.raises(SystemExit) as ended:
        cli.main(command)
    assert ended.value.code == 0
    assert "2 videos" in capsys.readouterr().out
    assert len(read_manifest(str(out))) == 2
    for words, more in (("already", []), ("split is 'x'", ["--split", "x"])):
        with pytest.raises(SystemExit) as ended:
            cli.main([*command, *more])
        assert ended.value.code == 2
        assert words in capsys.readouterr().err


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="count is 0"):
        write_digits(tmp_path / "a", SOURCE, 0)
    with pytest.raises(ValueError, match="codec is 'divx'"):
        write_digits(tmp_path / "a", SOURCE, 1, codec="divx")
    assert not (tmp_path / "a").exists()
