"""Media addresses to something that can be read: local files, object stores, members of tar shards.

    with open_media("s3://bucket/shard-000.tar::00012.mp4", Cache()) as media: av.open(media)

A plain path is given on by its name, which is fastest. `scheme://...` is read by fsspec through a
cache; `file://` too, for slow network folders. `SHARD.tar::MEMBER` is a part of a local or remote
tar.
"""

import io
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import BinaryIO

from fastjepa.data.cache import Cache
from fastjepa.data.decoder import DecodeError
from fastjepa.data.remote import RemoteFile, fetching, is_remote, open_part
from fastjepa.data.shards import Members, list_members

_MEMBER = re.compile(r"(?<=\.tar)::", re.IGNORECASE)


def split_member(address: str) -> tuple[str, str | None]:
    """Take `SHARD.tar::MEMBER` apart; None for what is no member."""
    shard, *member = _MEMBER.split(address, maxsplit=1)
    return shard, member[0] if member else None


@contextmanager
def open_media(address: str, cache: Cache) -> Iterator[str | BinaryIO]:
    """Give a local file's name, or a binary file that can be read and sought.

    A plain path is not looked at: what is wrong with it shows in opening it. Raises DecodeError for
    anything else that is not there or cannot be fetched.
    """
    shard, member = split_member(address)
    if member is None and not is_remote(address):
        yield address
        return
    with ExitStack() as stack:
        with fetching(address):
            start, size = 0, None
            if member is not None:
                start, size = _span(address, shard, member, cache)
            media: str | BinaryIO
            if size is not None and not is_remote(shard):
                handle = stack.enter_context(open(shard, "rb", buffering=0))
                media = stack.enter_context(open_part(handle, start, size, address))
            else:
                remote = RemoteFile(shard, start, size)
                path = stack.enter_context(cache.held(address, remote))
                media = stack.enter_context(remote.open()) if path is None else str(path)
        yield media


def members_of(shard: str, cache: Cache) -> Members:
    """What a local or remote tar holds; listed once a process, a remote one once a cache.

    Raises OSError, or ValueError for a file that is no uncompressed tar.
    """
    if is_remote(shard):
        return _remote_members(shard, cache)
    status = os.stat(shard)
    return _local_members(shard, status.st_mtime_ns, status.st_size)


def fingerprint(address: str, cache: Cache) -> tuple[int, int] | None:
    """Size in bytes and time of the last change in ns (0 where a store does not say).

    A member of a shard has its own size and the shard's time. None for what is not there, or cannot
    be asked for.
    """
    shard, member = split_member(address)
    try:
        with fetching(address):
            if not is_remote(shard):
                status = os.stat(shard)
                size, changed = status.st_size, status.st_mtime_ns
            else:
                size, changed = RemoteFile(shard).state()
            if member is not None:
                _, size = _span(address, shard, member, cache)
    except DecodeError:
        return None
    return size, changed


def forget(address: str, cache: Cache) -> None:
    """Drop what the cache holds of a remote file that has changed."""
    shard, _ = split_member(address)
    if is_remote(shard):
        cache.drop(address)
        cache.drop(_table_key(shard))
        _remote_members.cache_clear()


def _span(address: str, shard: str, member: str, cache: Cache) -> tuple[int, int]:
    span = members_of(shard, cache).span(member.encode("utf-8", "surrogateescape"))
    if span is None:
        raise DecodeError(address, "no such member in the shard", whole_file=True)
    return span


@lru_cache(maxsize=4096)
def _local_members(shard: str, mtime_ns: int, size: int) -> Members:
    """The arguments beside `shard` tell a changed file from the one that was listed."""
    with open(shard, "rb") as handle:
        return list_members(handle)


@lru_cache(maxsize=4096)
def _remote_members(shard: str, cache: Cache) -> Members:
    table = _Table(shard)
    with cache.held(_table_key(shard), table) as path:
        return table.members if path is None else Members.load(path)


def _table_key(shard: str) -> str:
    return f"members::{shard}.npz"


@dataclass(frozen=True)
class _Table:
    """The list of a remote shard's members, as a file of its own in the cache."""

    shard: str

    @cached_property
    def members(self) -> Members:
        # Headers lie far apart: small blocks fetch little of what is between them.
        with RemoteFile(self.shard).open(block=2**16) as handle:
            return list_members(handle)

    @cached_property
    def _data(self) -> bytes:
        data = io.BytesIO()
        self.members.save(data)
        return data.getvalue()

    def size(self) -> int:
        return len(self._data)

    def save(self, handle: BinaryIO) -> None:
        handle.write(self._data)
