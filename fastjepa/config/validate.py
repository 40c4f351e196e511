"""A plain tree of values to a `Recipe`; each mistake is told in one line, with the likely key.

Types are checked strictly, as JSON would be: `true` is no number and `3` is no text.
"""

import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from fastjepa.config.errors import RecipeError, shown
from fastjepa.config.schema import Recipe, Section


def validated(tree: Mapping[str, Any], source: Callable[[str], str]) -> Recipe:
    """Recipe of `tree`, nested dicts, lists and scalars.

    `source` names where a dotted key came from (a file, `override`). Raises RecipeError with a line
    for each mistake.
    """
    try:
        return Recipe.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        details = error.errors()
    places = [detail["loc"] for detail in details]
    lines = []
    for detail in details:
        place = detail["loc"]
        if any(len(other) > len(place) and other[: len(place)] == place for other in places):
            continue  # a list "too short" only because one of its entries is wrong
        key = ".".join(map(str, place))
        lines.append(f"{source(key)}: {key}: {_explained(detail)}")
    raise RecipeError(*lines)


def _explained(detail: ErrorDetails) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    place = tuple(map(str, detail["loc"]))
    if kind == "extra_forbidden":
        return f"unknown key; {_nearest_key(place)}"
    if kind == "missing":
        return f"missing; {_section(place[:-1])} needs it"
    found = shown(detail["input"])
    if kind == "literal_error":
        fits = f"expected {context['expected']}"
        names = [name.strip(" '") for name in context["expected"].replace(" or ", ",").split(",")]
        near = difflib.get_close_matches(str(detail["input"]), names, n=1)
        return f"found {found}, {fits}" + (f"; did you mean {near[0]}?" if near else "")
    if kind == "value_error":
        return f"found {found}, {context['error']}"
    return f"found {found}, expected {_fits(kind, context)}"


def _fits(kind: str, context: Mapping[str, Any]) -> str:
    bounds = {
        "greater_than": "a number above {gt:g}",
        "greater_than_equal": "a number of at least {ge:g}",
        "less_than": "a number below {lt:g}",
        "less_than_equal": "a number of at most {le:g}",
        "too_short": "a list of at least {min_length} entries",
        "too_long": "a list of at most {max_length} entries",
    }
    if kind in bounds:
        return bounds[kind].format(**context)
    return {
        "int_type": "a whole number",
        "float_type": "a number",
        "finite_number": "a finite number",
        "bool_type": "true or false",
        "string_type": "text (quote it if it is meant so)",
        "tuple_type": "a list",
        "model_type": "a mapping of keys to values",
    }.get(kind, kind.replace("_", " "))


def _nearest_key(place: tuple[str, ...]) -> str:
    """The likely intended key: a sibling, the same name elsewhere, or a close dotted key."""
    section, name = place[:-1], place[-1]
    siblings = _names(section)
    if near := difflib.get_close_matches(name, siblings, n=1):
        return f"did you mean {'.'.join((*section, *near))}?"
    keys = list(_dotted_keys(Recipe))
    near = [key for key in keys if key.rpartition(".")[2] == name]
    near = near or difflib.get_close_matches(".".join(place), keys, n=1, cutoff=0.75)
    if near:
        return f"did you mean {near[0]}?"
    return f"{_section(section)} has {', '.join(siblings)}"


def _section(place: tuple[str, ...]) -> str:
    return ".".join(place) or "a recipe"


def _names(section: tuple[str, ...]) -> list[str]:
    model: type[Section] = Recipe
    for part in section:
        if part in model.model_fields:  # an index stays with its list's kind of entry
            model = next(_sections_in(model.model_fields[part].annotation))
    return list(model.model_fields)


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from _sections_in(part)


def _dotted_keys(model: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.default, Section):
            yield from _dotted_keys(type(field.default), f"{prefix}{name}.")
