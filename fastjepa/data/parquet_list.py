"""Parquet lists, a million rows a second: columns in, columns out.

A batch of rows that is plain (paths that are there, known kinds, weights that are numbers) goes
through as whole columns; any other goes row by row, which finds and names what is wrong. What
`fastjepa index` writes is such a list too; its unreadable files become `Files.bad`.
"""

import os
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fastjepa.data.files import KINDS, Files, ManifestError, kind_of
from fastjepa.data.lists import COLUMNS, check_columns, entry_of
from fastjepa.data.quarantine import BadFile
from fastjepa.data.remote import SCHEME

# Marks an index among the file's metadata; its value is the version of the columns.
INDEX_MARK = b"fastjepa.index"


def read_parquet(handle: BinaryIO, named: str, keep_unreadable: bool = False) -> Files:
    """Read a Parquet list or an index. Raises ManifestError.

    With `keep_unreadable` an index's unreadable files are entries like the others, but for tars.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ManifestError(
            f"{named}: reading Parquet needs pyarrow (pip install pyarrow)"
        ) from None
    try:
        with parquet.ParquetFile(handle) as file:
            names = file.schema_arrow.names
            index = INDEX_MARK in (file.schema_arrow.metadata or {})
            if not index:
                check_columns(names, named)
            wanted = [n for n in (*COLUMNS, *("readable", "reason") * index) if n in names]
            batches = file.iter_batches(columns=wanted)
            parts = list(_parts(batches, named, keep_unreadable))
    except (pyarrow.ArrowException, OSError) as error:
        raise ManifestError(f"{named}: not a readable Parquet file ({error})") from None
    return Files.joined(parts) if parts else Files.of(())


def _parts(batches: Any, named: str, keep_unreadable: bool) -> Iterator[Files]:
    from pyarrow.compute import ends_with, invert, or_, utf8_lower

    first_row = 1
    for batch in batches:
        rows, first_row = first_row, first_row + len(batch)
        bad: list[BadFile] = []
        if "readable" in batch.schema.names:
            readable = batch.column("readable").fill_null(False)
            if keep_unreadable:
                tar = ends_with(utf8_lower(batch.column("path")), ".tar")
                readable = or_(readable, invert(tar))
            for row in batch.filter(invert(readable)).to_pylist():
                bad.append((entry_of(row, named, "index").path, str(row["reason"])))
            batch = batch.filter(readable)
        files = columns_of(batch, os.path.dirname(named), bad)
        if files is None:
            entries = (
                entry_of(row, named, f"row {rows + i}") for i, row in enumerate(batch.to_pylist())
            )
            files = Files.of(entries, bad)
        yield files


def columns_of(batch: Any, folder: str, bad: list[BadFile]) -> Files | None:
    """A record batch's columns as they are; None where its rows have to be looked at one by one."""
    import pyarrow
    from pyarrow import compute

    path = batch.column("path")
    if path.null_count or not pyarrow.types.is_string(path.type):
        return None
    path = path.cast(pyarrow.large_string())
    if compute.any(compute.match_substring_regex(path, "^(~|$)")).as_py():
        return None
    fixed = compute.match_substring_regex(path, f"^(/|{SCHEME.pattern})")
    if not compute.all(fixed).as_py():
        start, nothing = (
            pyarrow.scalar(text, pyarrow.large_string()) for text in (os.path.join(folder, ""), "")
        )
        joined = compute.binary_join_element_wise(start, path, nothing)
        path = compute.if_else(fixed, path, joined)
    kinds, weights = _kinds(batch, path), _weights(batch)
    if kinds is None or weights is None:
        return None
    _, offsets, text = path.buffers()
    ends = np.frombuffer(offsets, np.int64)[path.offset : path.offset + len(path) + 1]
    return Files(
        text.to_pybytes()[ends[0] : ends[-1]] if len(path) else b"",
        ends[1:] - ends[0],
        kinds,
        None if (weights == 1.0).all() else weights,
        tuple(bad),
    )


def _kinds(batch: Any, path: Any) -> NDArray[np.uint8] | None:
    """Places in KINDS, by the extension where the column says nothing."""
    import pyarrow
    from pyarrow import compute

    kinds = np.full(len(batch), len(KINDS), np.uint8)
    if "kind" in batch.schema.names:
        column = batch.column("kind")
        if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_null(column.type)):
            return None
        column = column.cast(pyarrow.string())
        found = compute.index_in(column, pyarrow.array(KINDS))
        if found.null_count > column.null_count:
            return None
        kinds = found.fill_null(len(KINDS)).to_numpy(zero_copy_only=False).astype(np.uint8)
    unsaid = np.flatnonzero(kinds == len(KINDS))
    told = [kind_of(name) for name in path.take(pyarrow.array(unsaid)).to_pylist()]
    if None in told:
        return None
    kinds[unsaid] = [KINDS.index(kind) for kind in told if kind is not None]
    return kinds


def _weights(batch: Any) -> NDArray[np.float64] | None:
    import pyarrow

    if "weight" not in batch.schema.names:
        return np.ones(len(batch))
    column = batch.column("weight")
    types = pyarrow.types
    if not (types.is_floating(column.type) or types.is_integer(column.type)):
        return None
    column = column.cast(pyarrow.float64()).fill_null(1.0)
    weights: NDArray[np.float64] = column.to_numpy(zero_copy_only=False)
    return weights if (np.isfinite(weights) & (weights >= 0.0)).all() else None
