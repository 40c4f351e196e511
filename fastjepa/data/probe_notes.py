"""What probes have found so far, a line of JSON each in a file: an interrupted run loses none.

Memory holds where each file's line is, and by which size and time it was found.
"""

import fcntl
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from fastjepa.data.probe import Facts

State = tuple[int, int] | None  # size in bytes, time of the last change in ns; None: not there


class ProbeNotes:
    """Lines by the files' paths, the last one of a path counts; closed by `with`.

    Raises ValueError when another process writes them, or when a line is not JSON.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "a+b")  # noqa: SIM115 (closed by __exit__)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path}: another process is making this index") from None
        self._end = 0
        self._lines: dict[str, tuple[int, State]] = {}
        self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._lines:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def __len__(self) -> int:
        return len(self._lines)

    def __contains__(self, path: str) -> bool:
        return path in self._lines

    def add(self, path: str, state: State, facts: dict[str, Any]) -> None:
        """Note what was found of a file that was in `state`."""
        size, changed = state or (None, None)
        row = {"path": path, "size": size, "mtime_ns": changed, **facts}
        line = json.dumps(row).encode() + b"\n"
        self._file.write(line)
        self._file.flush()
        self._lines[path] = (self._end, state)
        self._end += len(line)

    def state(self, path: str) -> State:
        """Size and time by which a noted file was found."""
        return self._lines[path][1]

    def facts(self, path: str) -> Facts:
        """What was found of a noted file."""
        self._file.seek(self._lines[path][0])
        row = json.loads(self._file.readline())
        return Facts(**{name: row[name] for name in asdict(Facts())})

    def remove(self) -> None:
        """They are in an index now."""
        self.path.unlink()

    def _read(self) -> None:
        self._file.seek(0)
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                os.truncate(self.path, self._end)  # a kill cut it short
                break
            try:
                row = json.loads(line)
                path, size = row["path"], row["size"]
                state = None if size is None else (size, row["mtime_ns"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{self.path}, line {number}: not what a probe found; remove the file to "
                    "begin anew"
                ) from None
            self._lines[path] = (self._end, state)
            self._end += len(line)
