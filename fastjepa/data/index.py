"""An index: a Parquet list of files with what a probe found of each; a manifest like any other.

files = files_to_index("clips/", cache); states = states_of(files, cache)
with ProbeNotes(path) as notes: rows = rows_to_probe(files, states, notes, cache, retry=False)
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from fastjepa.data.cache import Cache
from fastjepa.data.files import Entry, Files
from fastjepa.data.manifest import read_manifest
from fastjepa.data.parquet_list import INDEX_MARK
from fastjepa.data.probe import Facts
from fastjepa.data.probe_notes import ProbeNotes, State
from fastjepa.data.remote import is_remote
from fastjepa.data.storage import fingerprint, forget, split_member

SUFFIX = ".index.parquet"
_ROW_GROUP = 2**16
_SLICE = 10_000
_THREADS = 16
_NOT_UTF8 = "its name is not UTF-8, which a Parquet list cannot hold"


@dataclass
class Summary:
    """How many files an index holds: by codec, by what is wrong with them, and their length."""

    codecs: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    frames: int = 0
    seconds: float = 0.0

    def lines(self, most: int = 20) -> Iterator[str]:
        """In words, at most `most` reasons."""
        for codec, count in self.codecs.most_common():
            yield f"{count:9} {codec}"
        length = f"{self.frames} frames, {self.seconds / 3600:.2f} hours of video"
        yield f"{self.codecs.total():9} readable files: {length}"
        for reason, count in self.reasons.most_common(most):
            yield f"{count:9} unreadable: {reason}"
        if len(self.reasons) > most:
            yield f"{'':9} and {len(self.reasons) - most} more reasons"


def files_to_index(manifest: str, cache: Cache) -> Files:
    """All files of a manifest by absolute paths; of an older index the unreadable ones, too.

    Raises ManifestError.
    """
    files = read_manifest(manifest, cache, keep_unreadable=True)
    return Files.of(
        (entry._replace(path=_absolute(entry.path)) for entry in files),
        [(_absolute(path), reason) for path, reason in files.bad],
    )


def states_of(files: Files, cache: Cache) -> list[State]:
    """Size and time of each file, asked for by many threads: a network takes its time."""
    states: list[State] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(files), _SLICE):
            paths = [entry.path for entry in files[start : start + _SLICE]]
            states.extend(pool.map(lambda path: fingerprint(path, cache), paths))
    return states


def take_over(notes: ProbeNotes, index: Path) -> None:
    """Note what an older index says of files that are not noted yet.

    Raises ValueError for a file that is no index.
    """
    from pyarrow import ArrowException, parquet

    folder = os.path.abspath(index.parent)
    names = list(Facts.__dataclass_fields__)
    try:
        with parquet.ParquetFile(index) as file:
            if INDEX_MARK not in (file.schema_arrow.metadata or {}):
                raise ValueError(f"{index}: exists and is no index; choose another name")
            for batch in file.iter_batches(columns=["path", "size", "mtime_ns", *names]):
                for row in batch.to_pylist():
                    path = _placed(row["path"], folder)
                    if path not in notes:
                        state = None if row["size"] is None else (row["size"], row["mtime_ns"])
                        notes.add(path, state, {name: row[name] for name in names})
    except (ArrowException, OSError) as error:
        raise ValueError(f"{index}: not a readable index ({error})") from None


def rows_to_probe(
    files: Files, states: Sequence[State], notes: ProbeNotes, cache: Cache, *, retry: bool
) -> list[int]:
    """Files that are new or have changed since they were noted; with `retry`, unreadable ones."""
    rows = []
    for row, (entry, state) in enumerate(zip(files, states, strict=True)):
        if entry.path not in notes:
            rows.append(row)
        elif notes.state(entry.path) != state:
            forget(entry.path, cache)
            rows.append(row)
        elif retry and not notes.facts(entry.path).readable:
            rows.append(row)
    return rows


def write_index(
    handle: BinaryIO, folder: Path, files: Files, states: Sequence[State], notes: ProbeNotes
) -> Summary:
    """Write the noted files in the order of `files`; paths below `folder` relative to it."""
    from pyarrow import parquet, record_batch

    summary, schema = Summary(), index_schema()
    root = os.path.join(os.path.abspath(folder), "")
    with parquet.ParquetWriter(handle, schema) as writer:
        rows = _rows(files, states, notes, root, summary)
        while chunk := [row for row, _ in zip(rows, range(_ROW_GROUP), strict=False)]:
            columns = [[row.get(name) for row in chunk] for name in schema.names]
            writer.write_batch(record_batch(columns, schema=schema), row_group_size=_ROW_GROUP)
    return summary


def _rows(
    files: Files, states: Sequence[State], notes: ProbeNotes, root: str, summary: Summary
) -> Iterator[dict[str, Any]]:
    for entry, state in zip(files, states, strict=True):
        yield _row(entry, state, notes.facts(entry.path), root, summary)
    for path, reason in files.bad:
        yield _row(Entry(path, "video"), None, Facts(reason=reason), root, summary)


def _row(entry: Entry, state: State, facts: Facts, root: str, summary: Summary) -> dict[str, Any]:
    path, (size, changed) = entry.path.removeprefix(root), state or (None, None)
    row = {"weight": entry.weight, "kind": entry.kind, "size": size, "mtime_ns": changed}
    try:
        path.encode()
    except UnicodeEncodeError:
        path, facts = path.encode("utf-8", "replace").decode(), Facts(reason=_NOT_UTF8)
    if facts.readable:
        summary.codecs[facts.codec or "unknown"] += 1
        summary.seconds += facts.duration or 0.0
        summary.frames += facts.frames or 0
    else:
        summary.reasons[facts.reason or "unknown"] += 1
    return {"path": path, **row, **vars(facts)}


def index_schema() -> Any:
    """The columns of an index, a pyarrow schema."""
    import pyarrow as pa

    types = {"path": pa.string(), "weight": pa.float64(), "kind": pa.string()}
    types |= {"size": pa.int64(), "mtime_ns": pa.int64(), "codec": pa.string()}
    types |= {"frames": pa.int64(), "time_base": pa.string(), "fps": pa.float64()}
    types |= {"width": pa.int32(), "height": pa.int32(), "rotation": pa.int32()}
    types |= {"duration": pa.float64(), "readable": pa.bool_(), "reason": pa.string()}
    return pa.schema(list(types.items()), metadata={INDEX_MARK: b"1"})


def _absolute(address: str) -> str:
    shard, member = split_member(address)
    if is_remote(shard):
        return address
    return os.path.abspath(shard) + ("" if member is None else f"::{member}")


def _placed(path: str, folder: str) -> str:
    return path if is_remote(path) else os.path.join(folder, path)
