"""The file is whole or as it was."""

import os
from pathlib import Path

import pytest

from fastjepa.durable import atomic_file, whole_file


def test_the_new_content_takes_the_place_of_the_old(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_file(path) as handle:
        handle.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_an_error_leaves_the_old_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def half() -> None:
        with atomic_file(path) as handle:
            handle.write(b"ne")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_the_temporary_file_has_the_same_ending(tmp_path: Path) -> None:
    """From which PyAV and NumPy take the format."""
    with whole_file(tmp_path / "clip.mp4") as temporary:
        assert temporary.suffix == ".mp4"
        temporary.touch()
    assert os.listdir(tmp_path) == ["clip.mp4"]


def test_a_missing_folder_is_the_systems_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "no" / "a.txt"):
        pass
