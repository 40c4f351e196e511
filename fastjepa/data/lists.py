"""Lists of files: CSV, JSONL and Parquet with the columns `path`, `weight` and `kind`.

A CSV without a header holds `path label` lines, as the official V-JEPA files do. Relative paths
start at the list's folder. Rows go into columns one by one, so a long list needs little memory.
"""

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import chain
from typing import BinaryIO

from fastjepa.data.files import KINDS, Entry, Files, ManifestError, kind_of
from fastjepa.data.remote import is_remote

COLUMNS = ("path", "weight", "kind")
LISTS = (".csv", ".jsonl", ".parquet")

# The row's name, for messages, and its values.
Rows = Iterator[tuple[str, Mapping[str, object]]]


def read_list(handle: BinaryIO, named: str, keep_unreadable: bool = False) -> Files:
    """Read a list by the extension of its name, which errors give and relative paths start at.

    `keep_unreadable` is read_parquet's. Raises ManifestError for a column or value that is not
    known, and for an empty list.
    """
    if named.lower().endswith(".parquet"):
        from fastjepa.data.parquet_list import read_parquet

        files = read_parquet(handle, named, keep_unreadable)
    elif named.lower().endswith(".csv"):
        from fastjepa.data.plain_csv import read_plain_csv

        data = handle.read()
        plain = read_plain_csv(data, named)
        files = read_rows(io.BytesIO(data), named) if plain is None else plain
    else:
        files = read_rows(handle, named)
    if not files:
        none = (
            f"{len(files.bad)} files, none of them readable" if files.bad else "the list is empty"
        )
        raise ManifestError(f"{named}: {none}")
    if files.weights is not None and not files.weights.any():
        raise ManifestError(f"{named}: every weight is 0, nothing could be drawn")
    return files


def read_rows(handle: BinaryIO, named: str) -> Files:
    """Read a CSV or JSONL row by row, which finds what is wrong with one. Raises ManifestError."""
    text = io.TextIOWrapper(handle, "utf-8-sig", newline="")
    rows = _csv_rows(text, named) if named.lower().endswith(".csv") else _jsonl_rows(text, named)
    try:
        return Files.of(entry_of(row, named, where) for where, row in rows)
    except csv.Error as error:
        raise ManifestError(f"{named}: not a readable CSV file ({error})") from None
    except UnicodeDecodeError as error:
        raise ManifestError(f"{named}: not UTF-8 text ({error.reason})") from None


def header_of(first: str) -> list[str] | None:
    """The column names in a CSV's first line; None for one of `path label`."""
    names = [name.strip() for name in next(csv.reader([first]))]
    if "path" not in names and (len(names) == 1 or kind_of(names[0]) or _official_path(first)):
        return None
    return names


def _csv_rows(text: Iterable[str], named: str) -> Rows:
    lines = ((number, line) for number, line in enumerate(text, start=1) if line.strip())
    for number, first in lines:
        names = header_of(first)
        if names is None:
            yield from _official_rows(chain([(number, first)], lines), named)
            return
        check_columns(names, named)
        rows = csv.reader(line for _, line in lines)
        for row in rows:
            where = f"row {rows.line_num}"
            if len(row) != len(names):
                raise ManifestError(f"{named}, {where}: {len(row)} fields, expected {len(names)}")
            yield where, dict(zip(names, (field.strip() for field in row), strict=True))


def _official_rows(lines: Iterable[tuple[int, str]], named: str) -> Rows:
    for number, line in lines:
        path = _official_path(line)
        if path is None:
            raise ManifestError(
                f"{named}, line {number}: found {line.strip()[:80]!r}, expected `path label`, "
                f"or a first line of column names ({', '.join(COLUMNS)})"
            )
        yield f"line {number}", {"path": path}


def _official_path(line: str) -> str | None:
    """The path of `path label` or `path::label`, None for another line; labels are not used."""
    path, _, label = line.strip().rpartition("::" if "::" in line else " ")
    try:
        float(label)
    except ValueError:
        return None
    return path.strip().strip('"') or None


def _jsonl_rows(text: Iterable[str], named: str) -> Rows:
    checked: set[tuple[str, ...]] = set()
    for number, line in enumerate(text, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ManifestError(f"{named}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ManifestError(f"{named}, line {number}: expected an object, found {line[:80]!r}")
        if tuple(row) not in checked:
            check_columns(list(row), named)
            checked.add(tuple(row))
        yield f"line {number}", row


def check_columns(names: Sequence[str], named: str) -> None:
    """Raise ManifestError for a column that is not known, is missing, or is there twice."""
    known = f"known columns: {', '.join(COLUMNS)}"
    for name in names:
        if name not in COLUMNS:
            near = get_close_matches(name, COLUMNS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ManifestError(f"{named}: unknown column {name!r} ({known}){hint}")
    if "path" not in names:
        raise ManifestError(f"{named}: no column 'path' ({known})")
    if len(set(names)) < len(names):
        raise ManifestError(f"{named}: a column is named twice ({', '.join(names)})")


def entry_of(row: Mapping[str, object], named: str, where: str) -> Entry:
    """Check a row's values. Raises ManifestError that says where the row is."""
    path = row.get("path")
    if not isinstance(path, str) or not path:
        raise ManifestError(f"{named}, {where}: path is {path!r}, expected a file's path")
    kind = row.get("kind") or kind_of(path)
    if kind not in KINDS:
        raise ManifestError(
            f"{named}, {where}: {path!r} is of kind {kind!r}, expected 'video' or 'image' "
            "(by its extension, or in a column 'kind')"
        )
    if not is_remote(path):
        path = os.path.join(os.path.dirname(named), os.path.expanduser(path))
    return Entry(path, kind, _weight(row.get("weight"), named, where))


def _weight(value: object, named: str, where: str) -> float:
    if value is None or value == "":
        return 1.0
    try:
        weight = float(value) if isinstance(value, str | int | float) else math.nan
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight >= 0.0):
        raise ManifestError(f"{named}, {where}: weight is {value!r}, expected a number, 0 or more")
    return weight
