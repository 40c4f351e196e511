"""One address, many places: the same bytes by name, from a store, from a shard, or both."""

import fcntl
import os
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from fastjepa.data.cache import Cache
from fastjepa.data.decode_image import decode_image
from fastjepa.data.decode_pyav import decode_clip
from fastjepa.data.decoder import DecodeError
from fastjepa.data.manifest import read_manifest
from fastjepa.data.remote import fetching
from fastjepa.data.storage import fingerprint, open_media, split_member


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 10**7)


@pytest.fixture
def store() -> Iterator[MemoryFileSystem]:
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory, write_video: Callable) -> Path:
    """A tar of a video, a photograph, a text, a broken video and a name that points outside."""
    folder = tmp_path_factory.mktemp("shard")
    write_video(folder / "clip.mp4", options={"g": "12"})
    write_video(folder / "raw.h264", options={"g": "12", "bf": "0"})
    Image.new("RGB", (40, 30), (10, 20, 30)).save(folder / "photo.png")
    (folder / "label.txt").write_text("17")
    (folder / "empty.mp4").touch()
    path = folder / "shard-000.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("clip.mp4", "raw.h264", "photo.png", "label.txt", "empty.mp4"):
            tar.add(folder / name, f"00/{name}")
        tar.add(folder / "clip.mp4", "../../outside.mp4")
    return path


def _whole(address: str, cache: Cache) -> bytes:
    with open_media(address, cache) as media:
        return Path(media).read_bytes() if isinstance(media, str) else media.read()


def test_a_local_file_is_given_by_its_name(cache: Cache) -> None:
    with open_media("/no matter/if: it is::there.mp4", cache) as media:
        assert media == "/no matter/if: it is::there.mp4"
    assert split_member("/a.tar/b.tar::c/d.tar::e") == ("/a.tar/b.tar", "c/d.tar::e")


def test_a_member_of_a_shard_reads_as_the_file_it_was(shard: Path, cache: Cache) -> None:
    for name in ("clip.mp4", "raw.h264"):
        alone = decode_clip(str(shard.parent / name), 0.3, 6, 8.0)
        assert (decode_clip(f"{shard}::00/{name}", 0.3, 6, 8.0, None, cache) == alone).all()
    assert (decode_image(f"{shard}::00/photo.png", None, cache)[0] == [10, 20, 30]).all()
    assert not cache.folder.exists()


def test_a_shard_in_capitals_reads_as_any(shard: Path, cache: Cache, tmp_path: Path) -> None:
    place = tmp_path / "SHARD.TAR"
    place.write_bytes(shard.read_bytes())
    members = [entry.path for entry in read_manifest(str(place), cache)]
    assert f"{place}::00/photo.png" in members
    assert (decode_image(f"{place}::00/photo.png", None, cache)[0] == [10, 20, 30]).all()


def test_a_name_that_points_outside_is_only_a_name(shard: Path, cache: Cache) -> None:
    clip = decode_clip(f"{shard}::../../outside.mp4", 0.3, 6, 8.0, None, cache)
    assert (clip == decode_clip(str(shard.parent / "clip.mp4"), 0.3, 6, 8.0)).all()
    assert not (shard.parent.parent.parent / "outside.mp4").exists()


def test_a_store_gives_files_and_members_of_shards(
    shard: Path, store: MemoryFileSystem, cache: Cache
) -> None:
    store.pipe("/b/clip.mp4", (shard.parent / "clip.mp4").read_bytes())
    store.pipe("/b/shard.tar", shard.read_bytes())
    alone = decode_clip(str(shard.parent / "clip.mp4"), 0.3, 6, 8.0)
    for _ in range(2):
        for address in ("memory://b/clip.mp4", "memory://b/shard.tar::00/clip.mp4"):
            assert (decode_clip(address, 0.3, 6, 8.0, None, cache) == alone).all()
        store.store.clear()  # the second time all comes from the cache


def test_without_room_for_copies_a_store_is_read_directly(
    shard: Path, store: MemoryFileSystem, tmp_path: Path
) -> None:
    store.pipe("/b/clip.mp4", (shard.parent / "clip.mp4").read_bytes())
    store.pipe("/b/shard.tar", shard.read_bytes())
    alone = decode_clip(str(shard.parent / "clip.mp4"), 0.3, 6, 8.0)
    for limit in (0, 1000):
        small = Cache(tmp_path / "small", limit)
        for address in ("memory://b/clip.mp4", "memory://b/shard.tar::00/clip.mp4"):
            assert (decode_clip(address, 0.3, 6, 8.0, None, small) == alone).all()
        image = decode_image("memory://b/shard.tar::00/photo.png", None, small)
        assert (image[0] == [10, 20, 30]).all()
    assert sum(p.stat().st_size for p in (tmp_path / "small").iterdir()) <= 1000


@pytest.mark.parametrize(
    ("address", "words", "whole_file"),
    [
        ("{folder}/none.tar::a.mp4", "no such file", True),
        ("{folder}/shard-000.tar::a.mp4", "no such member in the shard", True),
        ("{folder}/fake.tar::a.mp4", "not an uncompressed tar", True),
        ("{folder}/shard-000.tar::00/empty.mp4", "the file is empty", True),
        ("{folder}/shard-000.tar::00/label.txt", "cannot be opened", True),
        ("memory://b/none.mp4", "no such file", True),
        ("memory://b/none.tar::a.mp4", "no such file", True),
        ("nowhere://b/a.mp4", "Protocol not known: nowhere", True),
        ("file://{folder}", "cannot be fetched", False),
    ],
)
def test_what_cannot_be_read_is_one_clear_error(
    shard: Path, store: MemoryFileSystem, cache: Cache, address: str, words: str, whole_file: bool
) -> None:
    (shard.parent / "fake.tar").write_bytes(b"\x1f\x8b" + bytes(range(250)) * 9)
    address = address.format(folder=shard.parent)
    for decode in (decode_clip, decode_image):
        arguments = (0.0, 4, 4.0) if decode is decode_clip else ()
        with pytest.raises(DecodeError) as caught:
            decode(address, *arguments, None, cache)  # type: ignore[operator]
        assert caught.value.path == address
        if decode is decode_clip:
            assert words in caught.value.reason
            assert caught.value.whole_file == whole_file


FIRST_FETCH = """
import sys
from fastjepa.data.decoder import DecodeError
from fastjepa.data.manifest import read_manifest
from fastjepa.data.remote import fetching
assert "botocore" not in sys.modules
try:
    with fetching("s3://b/a.mp4"):
        from botocore.exceptions import BotoCoreError
        raise BotoCoreError("no connection")
except DecodeError as error:
    print(error, error.whole_file)
"""


def test_the_first_error_of_a_library_imported_on_the_way_is_caught(tmp_path: Path) -> None:
    (tmp_path / "botocore").mkdir()
    (tmp_path / "botocore/__init__.py").touch()
    (tmp_path / "botocore/exceptions.py").write_text("class BotoCoreError(Exception): ...\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    found = subprocess.run(
        [sys.executable, "-c", FIRST_FETCH], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert found.stdout == "s3://b/a.mp4: cannot be fetched (no connection) False\n", found.stderr


@pytest.fixture
def web(shard: Path) -> Iterator[tuple[str, list[int]]]:
    """The address of clip.mp4 on a web server, and the status that it answers with."""
    pytest.importorskip("aiohttp")
    data, status = (shard.parent / "clip.mp4").read_bytes(), [200]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = data if status[0] == 200 else b""
            self.send_response(status[0])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/clip.mp4", status
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_web_server_that_is_down_for_a_moment_is_asked_again(
    web: tuple[str, list[int]], shard: Path, cache: Cache
) -> None:
    address, status = web
    for status[0], whole_file in ((503, False), (429, False), (404, True), (410, True)):
        with pytest.raises(DecodeError) as caught:
            decode_clip(address, 0.3, 6, 8.0, None, cache)
        assert caught.value.whole_file == whole_file
        assert ("no such file" if whole_file else str(status[0])) in caught.value.reason
        assert fingerprint(address, cache) is None
    status[0] = 200
    alone = decode_clip(str(shard.parent / "clip.mp4"), 0.3, 6, 8.0)
    assert (decode_clip(address, 0.3, 6, 8.0, None, cache) == alone).all()
    size, _ = fingerprint(address, cache) or (0, 0)
    assert size == (shard.parent / "clip.mp4").stat().st_size


def test_a_web_server_that_nobody_runs_is_out_of_reach(cache: Cache) -> None:
    pytest.importorskip("aiohttp")
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    with pytest.raises(DecodeError, match="cannot be fetched") as caught:
        decode_clip(f"http://127.0.0.1:{port}/a.mp4", 0.0, 2, 4.0, None, cache)
    assert not caught.value.whole_file


@pytest.mark.parametrize(
    ("cause", "whole_file"),
    [
        (ConnectionResetError("reset by peer"), False),
        (TimeoutError(), False),
        (FileNotFoundError("a.mp4"), True),
        (KeyError("a.mp4"), True),
        (None, True),
    ],
)
def test_a_file_not_found_for_want_of_a_connection_may_be_there(
    cause: Exception | None, whole_file: bool
) -> None:
    with pytest.raises(DecodeError) as caught, fetching("s3://b/a.mp4"):
        raise FileNotFoundError("s3://b/a.mp4") from cause
    assert caught.value.whole_file == whole_file
    assert whole_file or str(cause) in caught.value.reason


def test_a_shard_cut_off_still_gives_what_is_there(
    shard: Path, cache: Cache, tmp_path: Path
) -> None:
    data = shard.read_bytes()
    place = tmp_path / "cut.tar"
    with tarfile.open(shard) as tar:
        raw = tar.getmember("00/raw.h264")
    place.write_bytes(data[: raw.offset_data + raw.size // 2])
    alone = decode_clip(str(shard.parent / "clip.mp4"), 0.3, 6, 8.0)
    assert (decode_clip(f"{place}::00/clip.mp4", 0.3, 6, 8.0, None, cache) == alone).all()
    assert decode_clip(f"{place}::00/raw.h264", 0.0, 2, 8.0, None, cache).shape[0] == 2
    with pytest.raises(DecodeError, match="no such member"):
        decode_clip(f"{place}::00/photo.png", 0.3, 6, 8.0, None, cache)


def test_a_shard_that_changes_is_listed_again(shard: Path, cache: Cache, tmp_path: Path) -> None:
    place = tmp_path / "a.tar"
    for text in (b"one", b"eleven"):
        (tmp_path / "m.txt").write_bytes(text)
        with tarfile.open(place, "w") as tar:
            tar.add(tmp_path / "m.txt", "m.txt")
        assert _whole(f"{place}::m.txt", cache) == text


@pytest.mark.parametrize("inside", ["shard", "store"])
def test_a_playlist_read_through_python_opens_nothing(
    shard: Path, store: MemoryFileSystem, tmp_path: Path, write_video: Callable, inside: str
) -> None:
    """Neither what it names by an absolute path nor a file beside it."""
    part = write_video(tmp_path / "part.ts", options={"g": "12"})
    lists = {
        "hls.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{part}\n#EXT-X-ENDLIST\n",
        "concat.mp4": f"ffconcat version 1.0\nfile '{part}'\n",
        "file.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nfile://{part}\n#EXT-X-ENDLIST\n",
    }
    with av.open(str(part)) as container:
        assert container.streams.video
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
        if inside == "shard":
            with tarfile.open(tmp_path / "a.tar", "w") as tar:
                tar.add(tmp_path / name, name)
            address = f"{tmp_path}/a.tar::{name}"
        else:
            store.pipe(f"/b/{name}", text.encode())
            address = f"memory://b/{name}"
        with pytest.raises(DecodeError):
            decode_clip(address, 0.0, 2, 4.0, None, Cache(tmp_path / "none", 0))


READER = """
import sys
from pathlib import Path
from fastjepa.data.cache import Cache
from fastjepa.data.storage import open_media
folder, limit, *addresses = sys.argv[1:]
for address in addresses:
    with open_media(address, Cache(Path(folder), int(limit))) as media:
        data = Path(media).read_bytes() if isinstance(media, str) else media.read()
        assert data == Path(address.removeprefix("file://")).read_bytes(), address
"""


def test_many_processes_share_a_small_cache(tmp_path: Path) -> None:
    """Every read is right and the folder stays in its bounds while all of it is in motion."""
    random = np.random.default_rng(0)
    for i in range(12):
        (tmp_path / f"{i}.bin").write_bytes(random.bytes(20_000 + 1000 * i))
    folder, limit = tmp_path / "cache", 90_000
    readers = []
    for seed in range(3):
        order = np.random.default_rng(seed).integers(0, 12, 150)
        addresses = [f"file://{tmp_path}/{i}.bin" for i in order]
        readers.append(
            subprocess.Popen([sys.executable, "-c", READER, str(folder), str(limit), *addresses])
        )
    while any(reader.poll() is None for reader in readers):
        if (folder / ".total").exists():
            assert _bytes_in(folder) <= limit
        time.sleep(0.02)
    assert [reader.returncode for reader in readers] == [0, 0, 0]
    assert limit / 2 < _bytes_in(folder) <= limit
    assert not list(folder.glob(".*.part"))


def _bytes_in(folder: Path) -> int:
    """All files of a cache, while its ledger's lock keeps others from reserving space."""
    sizes = {}
    with open(folder / ".total", "rb") as ledger:
        fcntl.flock(ledger, fcntl.LOCK_EX)
        for entry in os.scandir(folder):
            with suppress(FileNotFoundError):
                status = os.stat(entry.path)
                sizes[status.st_ino] = 0 if entry.name == ".total" else status.st_size
    return sum(sizes.values())
