"""Data sets of probes: class folders, CSVs, pairs of pictures; what is wrong is named."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastjepa.probes.label_pictures import read_depth, read_mask
from fastjepa.probes.labelled_files import held_out, read_classes, read_pairs


def touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def test_class_folders(tmp_path: Path) -> None:
    touch(
        tmp_path / "b/1.mp4", tmp_path / "a/deep/2.png", tmp_path / "a/1.mp4", tmp_path / "a/x.txt",
        tmp_path / ".hidden/3.mp4", tmp_path / "loose.mp4",
    )  # fmt: skip
    found = read_classes(str(tmp_path))
    assert [Path(p).relative_to(tmp_path).as_posix() for p in found.paths] == [
        "a/1.mp4", "a/deep/2.png", "b/1.mp4",
    ]  # fmt: skip
    assert found.labels == [0, 0, 1]
    assert found.classes == ["a", "b"]


def test_numbers_as_classes_keep_their_order(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("/x y.mp4 10\nb.mp4 9\n")
    found = read_classes(str(tmp_path / "list.csv"))
    assert found.classes == ["9", "10"]
    assert found.paths == ["/x y.mp4", str(tmp_path / "b.mp4")]
    assert found.labels == [1, 0]


def test_a_csv_with_a_header_in_any_order(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text('label,path\ncat,"a, b.mp4"\ndog,c.mp4\n')
    found = read_classes(str(tmp_path / "list.csv"), ["dog", "cat"])
    assert found.paths == [str(tmp_path / "a, b.mp4"), str(tmp_path / "c.mp4")]
    assert found.labels == [1, 0]


def test_what_is_wrong_with_classes_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no CLASS/FILE with a video"):
        read_classes(str(tmp_path))
    with pytest.raises(ValueError, match="neither a folder nor a CSV"):
        read_classes(str(tmp_path / "none.csv"))
    file = tmp_path / "list.csv"
    file.write_text("a.mp4 1\nb.mp4\n")
    with pytest.raises(ValueError, match=r"list.csv: row 2: expected `path label`.*'b.mp4'"):
        read_classes(str(file))
    file.write_text("path,label\na.mp4,\n")
    with pytest.raises(ValueError, match=r"list.csv: row 2 lacks path or label"):
        read_classes(str(file))
    file.write_text("path,label\n")
    with pytest.raises(ValueError, match=r"list.csv: no rows"):
        read_classes(str(file))
    file.write_text("path,label\na.mp4,cow\n")
    with pytest.raises(ValueError, match=r"'cow' is no class of the training files.* cat, dog"):
        read_classes(str(file), ["cat", "dog"])


def test_pairs_by_stem_or_by_list(tmp_path: Path) -> None:
    touch(tmp_path / "images/b.jpg", tmp_path / "images/a.png", tmp_path / "masks/a.png")
    with pytest.raises(ValueError, match=r"b\.jpg has no label in masks"):
        read_pairs(str(tmp_path), "masks")
    touch(tmp_path / "masks/b.npy")
    found = read_pairs(str(tmp_path), "masks")
    assert [Path(p).name for p in found.paths] == ["a.png", "b.jpg"]
    assert [Path(p).name for p in found.labels] == ["a.png", "b.npy"]
    (tmp_path / "list.csv").write_text("image,label\nimages/b.jpg,masks/b.npy\n")
    (one,) = zip(*read_pairs(str(tmp_path / "list.csv"), "masks"), strict=True)
    assert one == (str(tmp_path / "images/b.jpg"), str(tmp_path / "masks/b.npy"))
    with pytest.raises(ValueError, match="expected the folders images and depths, no depths"):
        read_pairs(str(tmp_path), "depths")


def test_masks_and_depths(tmp_path: Path) -> None:
    classes = np.array([[0, 1], [2, 255]], np.uint8)
    palette = Image.fromarray(classes, "L").convert("P")
    palette.putdata(classes.ravel())
    for name, picture in (("grey.png", Image.fromarray(classes)), ("palette.png", palette)):
        picture.save(tmp_path / name)
        assert read_mask(str(tmp_path / name)).tolist() == classes.tolist()
    Image.fromarray(np.array([[0, 1500]], np.uint16)).save(tmp_path / "mm.png")
    torch.testing.assert_close(
        read_depth(str(tmp_path / "mm.png"), 0.001), torch.tensor([[0.0, 1.5]])
    )
    np.save(tmp_path / "metres.npy", np.array([[np.nan, np.inf, 2.5]]))
    assert read_depth(str(tmp_path / "metres.npy"), 0.001).tolist() == [[0.0, 0.0, 2.5]]


def test_what_is_no_label_picture_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (4, 3)).save(tmp_path / "colour.png")
    with pytest.raises(ValueError, match=r"colour.png: expected one number a pixel .*\(3, 4, 3\)"):
        read_mask(str(tmp_path / "colour.png"))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken.png: cannot be read as a label picture"):
        read_mask(str(tmp_path / "broken.png"))
    np.save(tmp_path / "half.npy", np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"half.npy: expected whole numbers as classes"):
        read_mask(str(tmp_path / "half.npy"))


@given(count=st.integers(2, 60), share=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_the_held_out_part_is_apart(count: int, share: float, seed: int) -> None:
    fit, choose = held_out(count, share, seed)
    assert sorted([*fit, *choose]) == list(range(count))
    assert fit
    assert choose
    assert abs(len(choose) - share * count) <= 1
    assert held_out(count, share, seed) == (fit, choose)


def test_no_part_can_be_held_out_of_one_file() -> None:
    with pytest.raises(ValueError, match=r"of at least 2 files, found 0\.1 of 1"):
        held_out(1, 0.1, 0)
    with pytest.raises(ValueError, match="a share between 0 and 1"):
        held_out(10, 1.0, 0)
