"""Copies of remote files: made once, bounded, the least recently used out first."""

import errno
import fcntl
import os
import threading
from pathlib import Path
from typing import BinaryIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastjepa.data.cache import Cache


class Bytes:
    """A remote file of given bytes that counts how often it is asked for."""

    def __init__(self, data: bytes, promised: int | None = None, error: int | None = None) -> None:
        self.data, self.promised, self.error, self.saved = data, promised, error, 0

    def size(self) -> int:
        return len(self.data) if self.promised is None else self.promised

    def save(self, handle: BinaryIO) -> None:
        self.saved += 1
        handle.write(self.data)
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))


def _read(cache: Cache, key: str, remote: Bytes) -> bytes | None:
    with cache.held(key, remote) as path:
        return None if path is None else path.read_bytes()


def _names(cache: Cache) -> list[str]:
    return sorted(path.name for path in cache.folder.iterdir())


def test_a_copy_is_made_once_and_keeps_the_extension(tmp_path: Path) -> None:
    cache, remote = Cache(tmp_path / "deep" / "cache", 100), Bytes(b"abc")
    with cache.held("s3://b/a.mp4", remote) as path:
        assert path is not None
        assert path.suffix == ".mp4"
    assert _read(cache, "s3://b/a.mp4", remote) == b"abc"
    assert remote.saved == 1
    cache.drop("s3://b/a.mp4")
    assert _read(cache, "s3://b/a.mp4", remote) == b"abc"
    assert remote.saved == 2


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache, places = Cache(tmp_path, 100), {}
    for name, used in (("a", 3), ("b", 1), ("c", 2), ("d", 4)):
        with cache.held(name, Bytes(name.encode() * 30)) as path:
            assert path is not None
            places[name] = path
            os.utime(path, (used, used))
    assert [name for name, place in places.items() if place.exists()] == ["a", "c", "d"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 60)), max_size=40))
def test_it_never_holds_more_than_its_limit(
    tmp_path_factory: pytest.TempPathFactory, reads: list[tuple[int, int]]
) -> None:
    cache = Cache(tmp_path_factory.mktemp("cache") / "c", 100)
    for number, size in reads:
        data = bytes([number]) * size
        found = _read(cache, f"{number}-{size}", Bytes(data))
        assert found == data
        sizes = [p.stat().st_size for p in cache.folder.iterdir() if p.name != ".total"]
        assert sum(sizes) <= 100


def test_what_is_being_read_stays(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 100)
    with cache.held("a", Bytes(b"a" * 60)) as path:
        assert path is not None
        assert _read(cache, "b", Bytes(b"b" * 60)) is None  # past the cache: no room can be made
        assert path.read_bytes() == b"a" * 60
    assert _read(cache, "b", Bytes(b"b" * 60)) == b"b" * 60


def test_what_does_not_fit_is_not_kept(tmp_path: Path) -> None:
    assert _read(Cache(tmp_path / "none", 0), "a", Bytes(b"a")) is None
    assert not (tmp_path / "none").exists()
    small = Cache(tmp_path / "small", 10)
    assert _read(small, "b", Bytes(b"bbb")) == b"bbb"
    before = _names(small)
    with pytest.warns(UserWarning, match="more than its 10 bytes .* are read past the cache"):
        assert _read(small, "a", Bytes(b"a" * 11)) is None
    assert _names(small) == before


def test_a_full_disk_is_said_and_read_past(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 100)
    for number in (errno.ENOSPC, errno.EDQUOT):
        with pytest.warns(UserWarning, match="no space left; remote files are read past the cache"):
            assert _read(cache, "a", Bytes(b"abc", error=number)) is None
    assert _names(cache) == [".total"]


def test_a_copy_that_failed_is_no_copy(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 100)
    with pytest.raises(OSError, match="Connection reset"):
        _read(cache, "a", Bytes(b"ab", error=errno.ECONNRESET))
    with pytest.raises(OSError, match="2 bytes came where 3 were expected"):
        _read(cache, "a", Bytes(b"ab", promised=3))
    assert _names(cache) == [".total"]
    assert _read(cache, "a", Bytes(b"abc")) == b"abc"


def test_a_copy_that_a_killed_process_left_half_made_is_made_anew(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 100)
    with cache.held("a", Bytes(b"abc")) as path:
        assert path is not None
    half = path.with_name(f".{path.name}.part")
    path.rename(half)
    assert _read(cache, "a", Bytes(b"xyz")) == b"xyz"
    half.write_bytes(b"q" * 90)  # an orphan is in the way of others, too
    (tmp_path / ".total").unlink()
    assert _read(cache, "b", Bytes(b"b" * 60)) == b"b" * 60


def test_who_asks_at_the_same_time_waits_for_the_one_copy(tmp_path: Path) -> None:
    cache, began, go_on = Cache(tmp_path, 100), threading.Event(), threading.Event()

    class Slow(Bytes):
        def save(self, handle: BinaryIO) -> None:
            super().save(handle)
            began.set()
            assert go_on.wait(60)

    remote, found = Slow(b"abc"), []
    threads = [
        threading.Thread(target=lambda: found.append(_read(cache, "a", remote))) for _ in range(3)
    ]
    threads[0].start()
    assert began.wait(60)
    for thread in threads[1:]:
        thread.start()
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert found == [b"abc"] * 3
    assert remote.saved == 1


def test_a_lost_ledger_is_counted_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 100)
    for name in "abc":
        _read(cache, name, Bytes(name.encode() * 30))
    (tmp_path / ".total").write_text("nonsense")
    _read(cache, "d", Bytes(b"d" * 30))
    assert sum(p.stat().st_size for p in tmp_path.iterdir() if p.name != ".total") <= 100


def test_locks_are_let_go(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 100)
    with cache.held("a", Bytes(b"abc")) as path:
        assert path is not None
    with open(path, "rb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
