"""The books of an import: a foreign YAML's keys, the recipe made of them, a report on each."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastjepa.config.errors import RecipeError, shown
from fastjepa.config.load import read_yaml
from fastjepa.config.schema import Recipe
from fastjepa.config.validate import validated

MISSING = object()  # a key that is absent and leaves our default


@dataclass(frozen=True)
class KeyReport:
    """What became of one official key.

    `kept`: the same meaning and value. `renamed`: our key `ours`, with `ours_value`. `ignored`: not
    taken over, for `reason`. Kept and renamed keys may carry a remark in `reason`.
    """

    key: str
    value: object
    status: Literal["kept", "renamed", "ignored"]
    ours: str = ""
    ours_value: object = None
    reason: str = ""


class KeyLedger:
    """The official file's flat keys on one side, our tree and the reports on the other."""

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self.values = dict(flat_keys(read_yaml(path)))
        self._tree: dict[str, Any] = {}
        self._reports: dict[str, KeyReport] = {}
        self._origin: dict[str, str] = {}

    def recipe(self) -> Recipe:
        def source(key: str) -> str:
            return f"{self.path} ({self._origin[key]})" if key in self._origin else str(self.path)

        return validated(self._tree, source)

    def reports(self) -> list[KeyReport]:
        return [
            self._reports.get(key) or KeyReport(key, value, "ignored", reason="unknown")
            for key, value in self.values.items()
        ]

    def set(self, ours: str, value: object) -> None:
        *sections, name = ours.split(".")
        node = self._tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value

    def move(self, key: str, ours: str, value: object, reason: str = "") -> None:
        """Set `ours` to `value`; report it if the file has `key`. MISSING leaves our default."""
        if value is MISSING:
            return
        self.set(ours, value)
        self.moved(key, ours, value, reason)

    def moved(self, key: str, ours: str, value: object, reason: str = "") -> None:
        if key in self.values:
            same = key == ours and value == self.values[key]
            status: Literal["kept", "renamed"] = "kept" if same else "renamed"
            self._reports[key] = KeyReport(key, self.values[key], status, ours, value, reason)
            self._origin[ours] = key

    def ignore(self, key: str, reason: str) -> None:
        if key in self.values:
            self._reports[key] = KeyReport(key, self.values[key], "ignored", reason=reason)

    def built_in(self, key: str, value: object) -> None:
        if key not in self.values:
            return
        if self.values[key] == value:
            self._reports[key] = KeyReport(key, value, "kept", reason="built in")
        else:
            self.ignore(key, f"not offered: {shown(value)} is built in")

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise self.error(key, "expected a number that is not negative")
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if not isinstance(value, int) or value < 1:
            raise self.error(key, "expected a whole number of at least 1")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "expected true or false")
        return value

    def many(self, key: str) -> list[Any]:
        value = self.values.get(key)
        if not isinstance(value, list) or not value:
            raise self.error(key, "expected a list")
        return value

    def error(self, key: str, fits: str) -> RecipeError:
        found = f"found {shown(self.values[key])}" if key in self.values else "missing"
        return RecipeError(f"{self.path}: {key}: {found}, {fits}")


def flat_keys(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys to scalars and lists of scalars; lists of mappings by index."""
    for name, value in tree.items():
        if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            yield from flat_keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
