"""Which files there are: a folder, a glob, a file, a list, tar shards, package data; the first five
in an object store, too.

Text in, `Files` out, in an order that does not depend on the file system. Files named by a list are
not opened here: a missing one shows when it is read, and is then counted by the quarantine.

    >>> read_manifest("package:sklearn/datasets/images")[0].kind
    'image'
"""

import glob
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastjepa.data.cache import DEFAULT, Cache
from fastjepa.data.decoder import DecodeError
from fastjepa.data.files import (
    IMAGE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    Entry,
    Files,
    ManifestError,
    kind_of,
    local_path,
)
from fastjepa.data.lists import LISTS, read_list
from fastjepa.data.quarantine import BadFile
from fastjepa.data.remote import fetching, filesystem, is_remote
from fastjepa.data.shards import COMPRESSED
from fastjepa.data.storage import members_of


def read_manifest(path: str, cache: Cache = DEFAULT, *, keep_unreadable: bool = False) -> Files:
    """List the videos and images that `path` stands for.

    A folder is walked recursively (links followed, hidden names left out) and sorted, a glob is
    sorted, a list keeps its order (see lists.py); tars stand for their members. All of these may be
    `scheme://...` addresses of fsspec. `package:NAME/FOLDER` is a folder inside an installed
    package, which is not imported. With `keep_unreadable` files that an index found unreadable are
    entries like the others, but for tars. Raises ManifestError when nothing is there, nothing fits,
    or a list is not as it should be.
    """
    if path.startswith("package:"):
        return _media(sorted(_walk(_package_folder(path))), path, cache)
    if is_remote(path):
        try:
            with fetching(path):
                return _read_remote(path, cache, keep_unreadable)
        except DecodeError as error:
            raise ManifestError(str(error)) from None
    place = local_path(path)
    if place.is_dir():
        return _media(sorted(_walk(place)), path, cache)
    if place.is_file():
        return _read_file(str(place), cache, keep_unreadable)
    if glob.has_magic(path):
        found = sorted(glob.glob(str(place), recursive=True))
        return _media(_uncompressed(found), path, cache)
    raise ManifestError(f"{path}: no such file or folder")


def _read_file(address: str, cache: Cache, keep_unreadable: bool) -> Files:
    kind = kind_of(address)
    if kind is not None:
        return Files.of([Entry(address, kind)])
    if address.lower().endswith((".tar", *COMPRESSED)):
        return _media(_uncompressed([address]), address, cache)
    if os.path.splitext(address)[1].lower() not in LISTS:
        raise ManifestError(
            f"{address}: neither a video nor an image nor a list ({', '.join(LISTS)}) nor a tar"
        )
    if not is_remote(address):
        with open(address, "rb") as handle:
            return read_list(handle, address, keep_unreadable)
    files, inside = filesystem(address)
    with files.open(inside, "rb") as handle:
        return read_list(handle, address, keep_unreadable)


def _read_remote(address: str, cache: Cache, keep_unreadable: bool) -> Files:
    files, inside = filesystem(address)
    if glob.has_magic(address):
        start = len(re.split(r"[*?[]", inside)[0].rpartition("/")[0])
        found = _visible(files, files.glob(inside), start)
        return _media(_uncompressed(found), address, cache)
    if files.isfile(inside):
        return _read_file(address, cache, keep_unreadable)
    if files.isdir(inside):
        return _media(_visible(files, files.find(inside), len(inside)), address, cache)
    raise ManifestError(f"{address}: no such file or folder")


def _visible(files: Any, names: list[str], start: int) -> list[str]:
    """Addresses, sorted, of the names with nothing hidden from `start` on."""
    return sorted(files.unstrip_protocol(name) for name in names if not _hidden(name[start:]))


def _hidden(name: str) -> bool:
    return any(part.startswith(".") and part.strip(".") for part in name.split("/"))


def _walk(folder: Path) -> Iterator[str]:
    """Yield every visible file below `folder`, each folder once even where links form a circle."""
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(parent, name) for name in files if not name.startswith("."))


def _uncompressed(paths: list[str]) -> list[str]:
    for path in paths:
        if path.lower().endswith(COMPRESSED):
            raise ManifestError(
                f"{path}: a compressed tar, whose members cannot be read one by one; "
                "unpack it to a plain .tar"
            )
    return paths


def _media(paths: Sequence[str], named: str, cache: Cache) -> Files:
    """The media files among `paths`, and those in their tars; a tar that is none is a bad file."""
    bad: list[BadFile] = []
    files = Files.of(_entries(paths, cache, bad), bad)
    if not files:
        why = f"; {bad[0][0]}: {bad[0][1]}" if bad else ""
        known = " ".join(sorted(VIDEO_EXTENSIONS | IMAGE_EXTENSIONS))
        raise ManifestError(
            f"{named}: {len(paths)} files, none of them a video or an image ({known}), "
            f"nor an uncompressed .tar of such{why}"
        )
    return files


def _entries(paths: Sequence[str], cache: Cache, bad: list[BadFile]) -> Iterator[Entry]:
    for path in paths:
        kind = kind_of(path)
        if kind is not None:
            yield Entry(path, kind)
        elif path.lower().endswith(".tar"):
            try:
                with fetching(path):
                    members = members_of(path, cache)
            except DecodeError as error:
                bad.append((path, error.reason))
                continue
            for name in members.names():
                member = name.decode("utf-8", "surrogateescape")
                kind = None if _hidden(member) else kind_of(member)
                if kind is not None:
                    yield Entry(f"{path}::{member}", kind)


def _package_folder(named: str) -> Path:
    name, _, folder = named.removeprefix("package:").partition("/")
    # A dotted name would make find_spec import the parent package.
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ManifestError(
            f"{named}: package {name!r} is not installed (form: package:NAME/FOLDER)"
        )
    for location in spec.submodule_search_locations:
        place = Path(location) / folder
        if place.is_dir():
            return place
    raise ManifestError(f"{named}: package {name!r} has no folder {folder!r}")
