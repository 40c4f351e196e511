"""The one exception of the recipe: what is wrong, one line for each mistake."""

from collections.abc import Sequence


class RecipeError(ValueError):
    """A recipe that cannot be used.

    Each of `lines` names the source (a file or `override`) where there is one, the dotted key, the
    value found and what fits; `str` of the exception is these lines.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines: Sequence[str] = lines


def shown(value: object, limit: int = 60) -> str:
    """`value` for an error message: on one line, cut at `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
