"""Which files there are: a folder, a glob, a file, a CSV, Parquet or JSONL list, package data.

Text in, `list[Entry]` out, in an order that does not depend on the file system. Files named by a
list are not opened here: a missing one shows when it is read, and is then counted by the
quarantine.

    >>> read_manifest("package:sklearn/datasets/images")[0].kind
    'image'
"""

import csv
import glob
import importlib.util
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path

from fastjepa.data.files import KINDS, Entry, Kind

VIDEO_EXTENSIONS = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts"}
    | {".wmv", ".flv", ".3gp", ".ogv", ".gif", ".y4m"}
)
IMAGE_EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
)
COLUMNS = ("path", "weight", "kind")


class ManifestError(ValueError):
    """The manifest cannot be used; the message names the file, the place and what fits."""


def kind_of(path: str | Path) -> Kind | None:
    """Tell a video from an image by the file's extension; None for anything else."""
    extension = Path(path).suffix.lower()
    if extension in VIDEO_EXTENSIONS:
        return "video"
    return "image" if extension in IMAGE_EXTENSIONS else None


def read_manifest(path: str) -> list[Entry]:
    """List the videos and images that `path` stands for.

    A folder is walked recursively (links followed, hidden names left out) and sorted, a glob is
    sorted, a list keeps its order. CSV and Parquet have the columns `path` and optionally `weight`
    and `kind`, JSONL the same as keys; a CSV without a header holds `path label` lines, as the
    official V-JEPA files do. Relative paths start at the list's folder. `package:NAME/FOLDER` is a
    folder inside an installed package, which is not imported. Raises ManifestError when nothing is
    there, nothing fits, or a column or value is not known.
    """
    if path.startswith("package:"):
        return _read_folder(_package_folder(path), path)
    place = Path(path).expanduser()
    if place.is_dir():
        return _read_folder(place, path)
    if place.is_file():
        return _read_file(place)
    if glob.has_magic(path):
        return _media_only(sorted(glob.glob(str(place), recursive=True)), path)
    raise ManifestError(f"{path}: no such file or folder")


def _read_file(place: Path) -> list[Entry]:
    kind = kind_of(place)
    if kind is not None:
        return [Entry(str(place), kind)]
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    reader = readers.get(place.suffix.lower())
    if reader is None:
        raise ManifestError(
            f"{place}: neither a video nor an image nor a list ({', '.join(readers)})"
        )
    try:
        entries = [_entry(row, place, where) for where, row in reader(place)]
    except csv.Error as error:
        raise ManifestError(f"{place}: not a readable CSV file ({error})") from None
    except UnicodeDecodeError as error:
        raise ManifestError(f"{place}: not UTF-8 text ({error.reason})") from None
    if not entries:
        raise ManifestError(f"{place}: the list is empty")
    if not any(entry.weight for entry in entries):
        raise ManifestError(f"{place}: every weight is 0, nothing could be drawn")
    return entries


def _read_folder(folder: Path, named: str) -> list[Entry]:
    return _media_only(sorted(_walk(folder)), named)


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


def _media_only(paths: list[str], named: str) -> list[Entry]:
    entries = [Entry(path, kind) for path in paths if (kind := kind_of(path)) is not None]
    if not entries:
        known = " ".join(sorted(VIDEO_EXTENSIONS | IMAGE_EXTENSIONS))
        raise ManifestError(
            f"{named}: {len(paths)} files, none of them a video or an image ({known})"
        )
    return entries


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


Rows = Iterator[tuple[str, Mapping[str, object]]]


def _csv_rows(place: Path) -> Rows:
    with place.open(encoding="utf-8-sig", newline="") as file:
        lines = [(i, line) for i, line in enumerate(file, start=1) if line.strip()]
    if not lines:
        return
    first = lines[0][1]
    names = [name.strip() for name in next(csv.reader([first]))]
    if "path" not in names and (len(names) == 1 or kind_of(names[0]) or _official_path(first)):
        yield from _official_rows(place, lines)
        return
    _check_columns(names, place)
    rows = csv.reader(line for _, line in lines[1:])
    for row in rows:
        where = f"row {rows.line_num}"
        if len(row) != len(names):
            raise ManifestError(f"{place}, {where}: {len(row)} fields, expected {len(names)}")
        yield where, dict(zip(names, (field.strip() for field in row), strict=True))


def _official_rows(place: Path, lines: Iterable[tuple[int, str]]) -> Rows:
    for number, line in lines:
        path = _official_path(line)
        if path is None:
            raise ManifestError(
                f"{place}, line {number}: found {line.strip()[:80]!r}, expected `path label`, "
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


def _jsonl_rows(place: Path) -> Rows:
    with place.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ManifestError(f"{place}, line {number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise ManifestError(
                    f"{place}, line {number}: expected an object, found {line[:80]!r}"
                )
            _check_columns(list(row), place)
            yield f"line {number}", row


def _parquet_rows(place: Path) -> Rows:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ManifestError(
            f"{place}: reading Parquet needs pyarrow (pip install pyarrow)"
        ) from None
    try:
        with parquet.ParquetFile(place) as file:
            _check_columns(list(file.schema_arrow.names), place)
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise ManifestError(f"{place}: not a readable Parquet file ({error})") from None


def _check_columns(names: list[str], place: Path) -> None:
    known = f"known columns: {', '.join(COLUMNS)}"
    for name in names:
        if name not in COLUMNS:
            near = get_close_matches(name, COLUMNS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ManifestError(f"{place}: unknown column {name!r} ({known}){hint}")
    if "path" not in names:
        raise ManifestError(f"{place}: no column 'path' ({known})")
    if len(set(names)) < len(names):
        raise ManifestError(f"{place}: a column is named twice ({', '.join(names)})")


def _entry(row: Mapping[str, object], place: Path, where: str) -> Entry:
    path = row.get("path")
    if not isinstance(path, str) or not path:
        raise ManifestError(f"{place}, {where}: path is {path!r}, expected a file's path")
    kind = row.get("kind") or kind_of(path)
    if kind not in KINDS:
        raise ManifestError(
            f"{place}, {where}: {path!r} is of kind {kind!r}, expected 'video' or 'image' "
            "(by its extension, or in a column 'kind')"
        )
    full = os.path.join(place.parent, os.path.expanduser(path))
    return Entry(full, kind, _weight(row.get("weight"), place, where))


def _weight(value: object, place: Path, where: str) -> float:
    if value is None or value == "":
        return 1.0
    try:
        weight = float(value) if isinstance(value, str | int | float) else math.nan
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight >= 0.0):
        raise ManifestError(f"{place}, {where}: weight is {value!r}, expected a number, 0 or more")
    return weight
