"""Functions of another codebase replaced by ours wherever they are bound, and put back again.

`from src.masks.utils import apply_masks` binds the function once more in every module that says
so. Replacing therefore goes through all modules that are loaded; those loaded later find the
replacement where the original was defined. Putting back goes the same way. Functions defined
inside other functions are out of reach.
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Function = Callable[..., Any]

# Each function that stands in for another one at present, and that one.
_originals: dict[Function, Function] = {}


@dataclass(frozen=True)
class Replacement:
    """A function of another codebase, by the module that defines it, and ours for it."""

    module: str
    name: str
    ours: Function

    def found(self) -> Function:
        """What is there now. Raises ValueError if nothing is or it is called otherwise."""
        try:
            module = importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{self.module}.".startswith(f"{error.name}."):
                raise
            raise ValueError(
                f"{self.module}: no such module; expected the checkout on the import path"
            ) from error
        found: Function | None = getattr(module, self.name, None)
        if not callable(found):
            raise ValueError(f"{self.module}: expected a function {self.name}, found {found!r}")
        expected = inspect.signature(self.ours).parameters.values()
        names = [parameter.name for parameter in expected]
        least = sum(parameter.default is parameter.empty for parameter in expected)
        taken = list(inspect.signature(found).parameters)
        if len(taken) < least or taken != names[: len(taken)]:
            raise ValueError(
                f"{self.module}.{self.name}: expected parameters {', '.join(names)}, "
                f"found {', '.join(taken)}"
            )
        return found

    def stand_in(self) -> Function:
        """Ours as a function of its own, so that no other use of ours is put back with it."""

        @functools.wraps(self.ours)
        def stand_in(*args: Any, **options: Any) -> Any:
            return self.ours(*args, **options)

        return stand_in


class Patch:
    """Replacements in force. `undo` puts the originals back, as does leaving a `with` block.

    Replacing twice is replacing once: the first `undo` ends it, a second one does nothing.
    """

    def __init__(self, replacements: Sequence[Replacement]) -> None:
        """Raises ValueError before anything is replaced if one of them cannot be."""
        self._stand_ins = []
        for one, found in [(replacement, replacement.found()) for replacement in replacements]:
            stand_in = found if found in _originals else one.stand_in()
            if found is not stand_in:
                _originals[stand_in] = found
                _rebind(found, stand_in)
            self._stand_ins.append(stand_in)

    def undo(self) -> None:
        for stand_in in self._stand_ins:
            if stand_in in _originals:
                _rebind(stand_in, _originals.pop(stand_in))

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def _rebind(old: Function, new: Function) -> None:
    """Give every module-level name of `old` to `new`."""
    for module in list(sys.modules.values()):
        bound = getattr(module, "__dict__", {})
        for name in [name for name, value in bound.items() if value is old]:
            setattr(module, name, new)
