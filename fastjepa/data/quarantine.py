"""Files that could not be read: each named once in a JSONL file, and a stop at too many.

The trainer gives it every batch's `bad`. Lines are `{"path", "reason", "time"}`; a restarted run
reads them back, so that a file is counted once however often it fails.
"""

import json
import os
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

BadFile = tuple[str, str]


class TooManyBadFiles(ValueError):  # noqa: N818 (named after the state it reports)
    """More files than allowed could not be read. `bad` holds (path, reason) of those just met."""

    def __init__(self, message: str, bad: Iterable[BadFile] = ()) -> None:
        super().__init__(message)
        self.bad = list(bad)


class Quarantine:
    """The bad files of a run, on disk at `path`, or in memory only when it is None.

    `total` files are in the manifest; more than `max_bad_share` of them may not be bad: `check`.
    Raises ValueError for a share outside [0, 1] or a quarantine file that is not one.
    """

    def __init__(self, path: Path | str | None, max_bad_share: float, total: int) -> None:
        if not 0.0 <= max_bad_share <= 1.0:
            raise ValueError(f"max_bad_share is {max_bad_share}, expected a share from 0 to 1")
        if total < 1:
            raise ValueError(f"total is {total}, expected the number of files, at least 1")
        self._path = None if path is None else Path(path)
        self._max_bad_share = max_bad_share
        self._total = total
        self._reasons: dict[str, str] = {}
        if self._path is not None and self._path.exists():
            self._reasons = _read(self._path)

    def __len__(self) -> int:
        return len(self._reasons)

    def files(self) -> list[BadFile]:
        """Those known so far."""
        return list(self._reasons.items())

    def add(self, bad: Iterable[BadFile]) -> list[BadFile]:
        """Note (path, reason) pairs and return those that are new.

        Raises TooManyBadFiles, after they are written, when there are new ones and `check` fails.
        """
        new = {path: reason for path, reason in bad if path not in self._reasons}
        if new:
            self._reasons.update(new)
            if self._path is not None:
                _append(self._path, new)
            self.check(new.items())
        return list(new.items())

    def check(self, new: Iterable[BadFile] = ()) -> None:
        """Raise TooManyBadFiles, which holds `new`, for more than the share or no good one left."""
        count = len(self._reasons)
        if count >= self._total or count > self._max_bad_share * self._total:
            raise TooManyBadFiles(self._complaint(), new)

    def _complaint(self) -> str:
        count, (path, reason) = len(self._reasons), next(reversed(self._reasons.items()))
        fact = f"{count} of {self._total} files cannot be read"
        limit = "" if count >= self._total else f", above max_bad_share {self._max_bad_share:g}"
        listed = f"; see {self._path}, and remove it once they are mended" if self._path else ""
        return f"{fact}{limit}; the last is {path}: {reason}{listed}"


def _append(path: Path, bad: dict[str, str]) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    lines = [json.dumps({"path": p, "reason": r, "time": now}) + "\n" for p, r in bad.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(lines))


def _read(path: Path) -> dict[str, str]:
    """Reasons by path; a last line that a kill cut short is taken off the file."""
    text = path.read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        os.truncate(path, whole)
    reasons = {}
    for number, line in enumerate(text[:whole].splitlines(), start=1):
        try:
            row = json.loads(line)
            reasons[row["path"]] = row["reason"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path}, line {number}: expected path and reason, found {line[:80]!r}"
            ) from None
    return reasons
