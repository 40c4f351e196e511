"""Writing so that a crash, at any moment, leaves the old content or the new, never half of one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's list of names, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(temporary: Path, final: Path) -> None:
    """Give a finished temporary file its name, over an older file too. Raises OSError."""
    sync(temporary)
    os.replace(temporary, final)
    sync(final.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8) whole or not at all. Raises OSError."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path`, in a folder that is there, once the block has
    ended without an error. Raises OSError."""
    with whole_file(path) as temporary, open(temporary, "wb") as handle:
        yield handle


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside `path`, of the same ending, for the file that takes its place once the block
    has ended without an error; after one nothing is left there. Raises OSError."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        yield temporary
        replace(temporary, path)
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)


def point(link: Path, target: str) -> None:
    """Make `link` a symbolic link to `target`, swapped in one move. Raises OSError."""
    temporary = link.with_name(f".tmp-{os.getpid()}-{link.name}")
    try:
        temporary.symlink_to(target)
        os.replace(temporary, link)
        sync(link.parent)
    finally:
        temporary.unlink(missing_ok=True)
