"""Files hold exactly what was given, or are not there."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from fastjepa.features.writer import FeatureWriter

FEATURES = {5: torch.randn(2, 3, 4, 8), 11: torch.randn(2, 3, 4, 8)}


def test_safetensors_hold_every_level_and_where_it_came_from(tmp_path: Path) -> None:
    paths = FeatureWriter(tmp_path / "out").write("cat", FEATURES, {"source": "cat.mp4"})
    assert paths == [tmp_path / "out" / "cat.safetensors"]
    with safe_open(paths[0], "pt") as file:
        assert set(file.keys()) == {"level5", "level11"}
        assert file.metadata() == {"source": "cat.mp4"}
        assert torch.equal(file.get_tensor("level11"), FEATURES[11])


def test_npy_holds_one_level_a_file(tmp_path: Path) -> None:
    paths = FeatureWriter(tmp_path, "npy").write("cat", FEATURES)
    assert [p.name for p in paths] == ["cat.level5.npy", "cat.level11.npy"]
    array = np.load(paths[1], allow_pickle=False)
    assert array.shape == (2, 3, 4, 8)
    assert np.array_equal(array, FEATURES[11].numpy())


def test_zarr_holds_every_level_in_chunks_of_one_step(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    writer = FeatureWriter(tmp_path, "zarr", overwrite=True)
    for _ in range(2):
        [path] = writer.write("cat.v2", FEATURES, {"source": "cat.mp4"})
    assert [p.name for p in tmp_path.iterdir()] == ["cat.v2.zarr"]
    group = zarr.open_group(path, mode="r")
    assert dict(group.attrs) == {"source": "cat.mp4"}
    assert set(group.array_keys()) == {"level5", "level11"}
    assert np.array_equal(group["level11"][:], FEATURES[11].numpy())
    assert group["level11"].chunks == (1, 3, 4, 8)


def test_bfloat16_is_kept_or_widened(tmp_path: Path) -> None:
    narrow = {11: FEATURES[11].bfloat16()}
    [path] = FeatureWriter(tmp_path).write("cat", narrow)
    with safe_open(path, "pt") as file:
        assert file.get_tensor("level11").dtype == torch.bfloat16
    [path] = FeatureWriter(tmp_path, "npy").write("cat", narrow)
    array = np.load(path)
    assert array.dtype == np.float32
    assert np.array_equal(array, narrow[11].float().numpy())


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    view = FEATURES[5].transpose(0, 2)[:, 1:]
    [path] = FeatureWriter(tmp_path).write("view", {0: view})
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor("level0"), view)


@pytest.mark.parametrize("form", ["safetensors", "npy"])
def test_a_file_that_exists_is_not_overwritten_unasked(tmp_path: Path, form: str) -> None:
    [path] = FeatureWriter(tmp_path, form).write("cat", {5: FEATURES[5]})  # type: ignore[arg-type]
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"cat.*exists already"):
        FeatureWriter(tmp_path, form).write("cat", {5: FEATURES[11]})  # type: ignore[arg-type]
    assert path.read_bytes() == before
    FeatureWriter(tmp_path, form, overwrite=True).write("cat", {5: FEATURES[11]})  # type: ignore[arg-type]
    assert path.read_bytes() != before
    assert os.listdir(tmp_path) == [path.name]


def test_names_may_hold_folders_but_not_leave_the_folder(tmp_path: Path) -> None:
    [path] = FeatureWriter(tmp_path).write("cats/one", FEATURES)
    assert path == tmp_path / "cats" / "one.safetensors"
    for name in ("../one", "/one", ""):
        with pytest.raises(ValueError, match="no name for a file inside"):
            FeatureWriter(tmp_path / "cats").write(name, FEATURES)


def test_what_is_no_feature_map_is_refused(tmp_path: Path) -> None:
    writer = FeatureWriter(tmp_path)
    with pytest.raises(ValueError, match=r"'cat', level 5: expected \[T', H', W', D\].*\(3, 8\)"):
        writer.write("cat", {5: torch.zeros(3, 8)})
    with pytest.raises(ValueError, match="no level"):
        writer.write("cat", {})
    with pytest.raises(ValueError, match="'pickle'"):
        FeatureWriter(tmp_path, "pickle")  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("form", ["safetensors", "npy"])
def test_a_disk_that_refuses_leaves_nothing_half_written(tmp_path: Path, form: str) -> None:
    program = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from fastjepa.features.writer import FeatureWriter\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))\n"
        "writer = FeatureWriter(Path(sys.argv[1]), sys.argv[2])\n"
        "writer.write('x', {5: torch.zeros(8, 16, 16, 64)})\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), form], capture_output=True, text=True
    )
    assert "OSError" in run.stderr
    assert os.listdir(tmp_path) == []
