"""CSV lists in whole columns by pyarrow, where nothing in them asks for more thought.

A list with quotes, blank lines, a value that does not fit, or anything else out of the ordinary is
left to the row reader, which also says what is wrong; so is every list where pyarrow is missing.
"""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from fastjepa.data.files import Files
from fastjepa.data.lists import COLUMNS, header_of
from fastjepa.data.parquet_list import columns_of

_UNUSED = b"\x1f"  # a delimiter that no line has: the line is one field
_OFFICIAL = r"^(?P<path>.*[^ ]) +(?P<label>[+-]?[0-9]+(?:\.[0-9]+)?)$"


def read_plain_csv(data: bytes, named: str) -> Files | None:
    """Read a CSV with plain rows; None for any other."""
    data = data.removeprefix(b"\xef\xbb\xbf")
    first = data.partition(b"\n")[0]
    odd = not first.strip() or b'"' in data or _UNUSED in data
    if odd or find_spec("pyarrow") is None:
        return None
    from pyarrow import ArrowInvalid

    try:
        names = header_of(first.decode())
        batches = _official(data) if names is None else _with_header(data, names)
        parts = [None if b is None else columns_of(b, os.path.dirname(named), []) for b in batches]
    except (ArrowInvalid, UnicodeDecodeError):
        return None
    whole = [part for part in parts if part is not None]
    return Files.joined(whole) if whole and len(whole) == len(parts) else None


def _with_header(data: bytes, names: list[str]) -> Iterator[Any]:
    """Batches with the known columns; None for one whose fields would have to be stripped."""
    import pyarrow
    from pyarrow import compute, csv

    if not set(names) <= set(COLUMNS) or "path" not in names or len(set(names)) < len(names):
        yield None
        return
    types = {"path": pyarrow.string(), "weight": pyarrow.float64(), "kind": pyarrow.string()}
    reader = csv.open_csv(
        pyarrow.BufferReader(data),
        read_options=csv.ReadOptions(column_names=names, skip_rows=1),
        convert_options=csv.ConvertOptions(
            column_types={name: types[name] for name in names}, null_values=[""]
        ),
    )
    for batch in reader:
        spaced = compute.match_substring_regex(batch.column("path"), r"^\s|\s$")
        yield None if compute.any(spaced).as_py() else batch


def _official(data: bytes) -> Iterator[Any]:
    """Batches of paths out of `path label` lines; None for one with lines of another form."""
    import pyarrow
    from pyarrow import compute, csv

    if b"::" in data:
        yield None
        return
    reader = csv.open_csv(
        pyarrow.BufferReader(data),
        read_options=csv.ReadOptions(column_names=["line"]),
        parse_options=csv.ParseOptions(delimiter=_UNUSED.decode(), quote_char=False),
        convert_options=csv.ConvertOptions(column_types={"line": pyarrow.string()}),
    )
    for batch in reader:
        line = compute.utf8_trim_whitespace(batch.column("line"))
        found = compute.extract_regex(line, _OFFICIAL)
        if found.null_count:
            yield None
        else:
            path = compute.struct_field(found, "path")
            yield pyarrow.record_batch([path], names=["path"])
