"""Tar shards (WebDataset and others): where each member lies, so that reading one is one seek.

    members = list_members(handle)
    members.span(b"00012.mp4")

Names in a tar are only names: nothing is ever written by them.
"""

import tarfile
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")


@dataclass(frozen=True, eq=False)
class Members:
    """The regular files of a tar in columns: names in order of their bytes, and their places.

    `text` holds the names one after the other, `ends` int64 [N] where each ends; `starts` and
    `sizes` int64 [N] are bytes in the tar.
    """

    text: bytes
    ends: NDArray[np.int64]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ends)

    def names(self) -> Iterator[bytes]:
        """All names, sorted."""
        return (self._name(row) for row in range(len(self)))

    def span(self, name: bytes) -> tuple[int, int] | None:
        """Where the member starts and how many bytes it has; None for a name that is not there."""
        row = bisect_left(range(len(self)), name, key=self._name)
        if row == len(self) or self._name(row) != name:
            return None
        return int(self.starts[row]), int(self.sizes[row])

    def save(self, handle: BinaryIO) -> None:
        """Write them for `load`."""
        text = np.frombuffer(self.text, np.uint8)
        np.savez(handle, text=text, ends=self.ends, starts=self.starts, sizes=self.sizes)

    @classmethod
    def load(cls, path: Path) -> "Members":
        """Read what `save` wrote."""
        with np.load(path) as file:
            return cls(file["text"].tobytes(), file["ends"], file["starts"], file["sizes"])

    def _name(self, row: int) -> bytes:
        return self.text[int(self.ends[row - 1]) if row else 0 : int(self.ends[row])]


def list_members(handle: BinaryIO) -> Members:
    """Read the headers of an uncompressed tar.

    Of two members with one name the last counts, as in unpacking. A tar that is cut off gives the
    members that begin before its end. Raises ValueError for a file that is none.
    """
    found: dict[bytes, tuple[int, int]] = {}
    try:
        with tarfile.open(fileobj=handle, mode="r:") as tar:
            try:
                for member in tar:
                    if member.isreg() and not member.issparse():
                        name = member.name.encode("utf-8", "surrogateescape")
                        found[name] = (member.offset_data, member.size)
            except tarfile.ReadError:
                pass  # cut off: the rest is not there
    except tarfile.TarError as error:
        raise ValueError(f"not an uncompressed tar ({error})") from None
    names = sorted(found)
    places = np.array([found[name] for name in names], np.int64).reshape(len(names), 2)
    return Members(
        b"".join(names),
        np.cumsum([len(name) for name in names], dtype=np.int64),
        places[:, 0].copy(),
        places[:, 1].copy(),
    )
