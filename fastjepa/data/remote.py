"""Files that fsspec reads: object stores, web servers, anything with a `scheme://`.

fsspec and a store's own library are needed by who has such addresses only (`fastjepa[store]`).
"""

import io
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from fastjepa.data.decoder import DecodeError
from fastjepa.data.files import ManifestError

SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# What stores raise besides OSError, by the module that has it.
_STORE_ERRORS = {
    "aiohttp": "ClientError",
    "azure.core.exceptions": "AzureError",
    "botocore.exceptions": "BotoCoreError",
    "gcsfs.retry": "HttpError",
}
# Statuses of HTTP by which a file is not there, rather than out of reach.
_GONE = (404, 410)
_CHUNK = 2**22


def is_remote(address: str) -> bool:
    """Whether fsspec reads it, rather than the operating system."""
    return SCHEME.match(address) is not None


def filesystem(address: str) -> tuple[Any, str]:
    """The fsspec file system of a remote address, and the path in it.

    Raises ValueError without fsspec, or for a scheme that it does not know or lacks the library of.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        reason = "fsspec is needed to read it (pip install 'fastjepa[store]')"
        raise ValueError(reason) from None
    try:
        return cast(tuple[Any, str], url_to_fs(address))
    except ImportError as error:
        raise ValueError(str(error)) from None


@contextmanager
def fetching(address: str) -> Iterator[None]:
    """Turn what goes wrong in reading a store into a DecodeError that names the address.

    A ManifestError, which names its file, passes through.
    An OSError other than a missing file may have passed when it is tried again.
    """
    try:
        yield
    except (DecodeError, ManifestError):
        raise
    except ValueError as error:
        raise DecodeError(address, str(error), whole_file=True) from None
    except _passing_errors() as error:
        found = _behind(error)
        if isinstance(found, FileNotFoundError):
            raise DecodeError(address, "no such file", whole_file=True) from None
        reason = f"cannot be fetched ({found or type(found).__name__})"
        raise DecodeError(address, reason) from None


def _passing_errors() -> tuple[type[Exception], ...]:
    """Those of the libraries that are imported by now: a store's own one comes with its use."""
    known = [getattr(sys.modules[m], name) for m, name in _STORE_ERRORS.items() if m in sys.modules]
    return (OSError, *known)


def _behind(error: BaseException) -> BaseException:
    """What happened: fsspec's HTTP says of a file out of reach, too, that it is not found."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(cause, _passing_errors()):
        return error
    gone = any(getattr(cause, name, None) in _GONE for name in ("status", "status_code"))
    return error if gone or isinstance(cause, ValueError) else cause


@dataclass(frozen=True)
class RemoteFile:
    """A remote file, or `length` bytes of it from `start`; what a cache can copy (see Remote)."""

    address: str
    start: int = 0
    length: int | None = None

    def size(self) -> int:
        """Bytes to copy."""
        if self.length is not None:
            return self.length
        files, path = filesystem(self.address)
        return int(files.size(path))

    def state(self) -> tuple[int, int]:
        """Bytes of the whole file, and when it last changed in ns; 0 where the store knows none."""
        files, path = filesystem(self.address)
        size = int(files.size(path))
        try:
            return size, int(files.modified(path).timestamp() * 1e9)
        except NotImplementedError:
            return size, 0

    def save(self, handle: BinaryIO) -> None:
        """Write all of it."""
        files, path = filesystem(self.address)
        if self.length is None:
            with files.open(path, "rb", block_size=_CHUNK) as source:
                shutil.copyfileobj(source, handle, _CHUNK)
        else:
            handle.write(files.cat_file(path, start=self.start, end=self.start + self.length))

    def open(self, block: int = _CHUNK) -> BinaryIO:
        """A file object that asks the store for what is read, in blocks."""
        files, path = filesystem(self.address)
        handle = files.open(path, "rb", block_size=block)
        return open_part(handle, self.start, self.size(), self.address)


def open_part(handle: BinaryIO, start: int, size: int, address: str) -> BinaryIO:
    """A file of its own within an open one, which it closes; reading raises DecodeError."""
    return io.BufferedReader(_Part(handle, start, size, address))


class _Part(io.RawIOBase):
    def __init__(self, handle: BinaryIO, start: int, size: int, address: str) -> None:
        self.name = address  # FFmpeg guesses some formats by the extension
        self._handle = handle
        self._start = start
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = memoryview(buffer)[: max(0, self._size - self._at)]
        with fetching(self.name):
            self._handle.seek(self._start + self._at)
            data = self._handle.read(len(wanted))
        wanted[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._handle.close()
        super().close()
