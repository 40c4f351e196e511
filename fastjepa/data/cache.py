"""A folder of bounded size that holds copies of remote files, for all processes of a machine.

fsspec's own caches were not enough: `filecache` and `simplecache` have no bound on their size, and
`blockcache` neither. Here a copy is made once however many processes ask, the least recently used
ones go first, and none goes while a process reads it. Locks are the kernel's (flock), so a killed
process leaves none behind; the folder should be on a local disk.

    with Cache().held("s3://bucket/a.mp4", remote) as path: ...
"""

import errno
import fcntl
import hashlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

_FULL = (errno.ENOSPC, errno.EDQUOT)
# What has been put there, in bytes: exact or too high, never too low.
_LEDGER = ".total"


class Remote(Protocol):
    """What is to be copied: its size in bytes, and how to write all of it."""

    def size(self) -> int: ...

    def save(self, handle: BinaryIO) -> None: ...


def default_folder() -> Path:
    """`fastjepa` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastjepa"


@dataclass(frozen=True)
class Cache:
    """Copies in `folder`, together at most `limit` bytes; a limit of 0 keeps none."""

    folder: Path = field(default_factory=default_folder)
    limit: int = 16 * 2**30

    @contextmanager
    def held(self, key: str, remote: Remote) -> Iterator[Path | None]:
        """Give the copy of `key`, made now if there is none, which stays at least until the end.

        Gives None when it cannot be kept: too large, too many others in use, no space left on the
        disk. Errors of `remote` pass through.
        """
        descriptor = self._kept(key) if self.limit else None
        while self.limit and descriptor is None and self._make(key, remote):
            descriptor = self._kept(key)
        try:
            yield None if descriptor is None else self._place(key)
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def drop(self, key: str) -> None:
        """Forget a copy; who reads it goes on."""
        self._place(key).unlink(missing_ok=True)

    def _place(self, key: str) -> Path:
        # FFmpeg guesses some formats by their extension.
        extension = PurePosixPath(key).suffix[:16]
        return self.folder / (hashlib.sha256(key.encode()).hexdigest()[:32] + extension)

    def _kept(self, key: str) -> int | None:
        """Open the copy if it is there, locked against removal and marked as used."""
        place = self._place(key)
        try:
            descriptor = os.open(place, os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if _is_at(descriptor, place):
            with suppress(PermissionError):  # another user's copy
                os.utime(descriptor)
            return descriptor
        os.close(descriptor)
        return None

    def _make(self, key: str, remote: Remote) -> bool:
        """Copy it, or wait for the process that does; False when it cannot be kept."""
        place = self._place(key)
        partial = place.with_name(f".{place.name}.part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
            with os.fdopen(descriptor, "wb") as handle:
                fcntl.flock(handle, fcntl.LOCK_EX)
                if not _is_at(descriptor, partial):
                    return True  # another process has finished it, or given up
                done = False
                try:
                    if place.exists():
                        return True
                    if self._copied(handle, remote):
                        with self._ledger():  # who counts files meanwhile would miss it
                            os.replace(partial, place)
                        done = True
                finally:
                    if not done:
                        partial.unlink(missing_ok=True)
                return done
        except OSError as error:
            if error.errno not in _FULL:
                raise
        warnings.warn(
            f"{self.folder}: no space left; remote files are read past the cache", stacklevel=2
        )
        return False

    def _copied(self, handle: BinaryIO, remote: Remote) -> bool:
        size = remote.size()
        if size > self.limit:
            warnings.warn(
                f"{self.folder}: remote files of more than its {self.limit} bytes (data.cache.gib) "
                "are read past the cache",
                stacklevel=2,
            )
            return False
        if not self._reserve(handle.fileno(), size):
            return False
        remote.save(handle)
        if handle.tell() != size:
            raise OSError(f"{handle.tell()} bytes came where {size} were expected")
        handle.flush()
        return True

    def _reserve(self, descriptor: int, size: int) -> bool:
        """Give the file its size ahead, so that all processes count it."""
        with self._ledger() as ledger:
            text = ledger.read()
            total = int(text) if text.isdigit() else self.limit
            if total + size > self.limit:
                total = self._make_room(size)
            fits = total + size <= self.limit
            if fits:
                os.truncate(descriptor, size)
            ledger.truncate(0)
            ledger.write(b"%d" % (total + size * fits))
        return fits

    @contextmanager
    def _ledger(self) -> Iterator[BinaryIO]:
        """The ledger, locked: files get their size or their final name, or go, only meanwhile."""
        with open(self.folder / _LEDGER, "a+b") as ledger:
            fcntl.flock(ledger, fcntl.LOCK_EX)
            ledger.seek(0)
            yield ledger

    def _make_room(self, size: int) -> int:
        """Remove what was not used for longest, a tenth at least; the bytes that are left."""
        found = []
        for entry in os.scandir(self.folder):
            if entry.name != _LEDGER:
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    found.append((status.st_mtime_ns, status.st_size, entry.path))
        total = sum(length for _, length, _ in found)
        for _, length, path in sorted(found):
            if total <= self.limit - max(size, self.limit // 10):
                break
            if _removed(path):
                total -= length
        return total


DEFAULT = Cache()


def _removed(path: str) -> bool:
    """Remove a file unless a process reads or writes it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(descriptor, Path(path)):
            os.unlink(path)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one that `path` names."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
