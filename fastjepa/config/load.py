"""YAML and `key=value` overrides to a recipe, and a recipe back to YAML.

    recipe = load_recipe("configs/demo.yaml", ["train.steps=100", "data.video=/my/clips"])

YAML is read as plain data: tags that would construct objects are refused.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fastjepa.config.errors import RecipeError, shown
from fastjepa.config.schema import Recipe
from fastjepa.config.validate import validated

__all__ = ["RecipeError", "dump_recipe", "load_recipe", "read_yaml"]

_PLAIN_TAGS = {"str", "int", "float", "bool", "null", "map", "seq", "timestamp", "merge", "value"}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Recipe of the YAML file `path`, changed by `key=value` overrides with dotted keys.

    Entries of lists go by index (`data.video.0.path=clips.csv`; the index after the last adds one),
    and a value may be any YAML (`data.video=[{path: a, weight: 2}]`). `${other.key}` and
    `${oc.env:NAME}` are filled in. Raises RecipeError: one line for each mistake, naming file or
    override, key, value and what fits.
    """
    tree = read_yaml(path)
    keys = []
    for override in overrides:
        key, value = _parsed(override)
        _put(tree, key, value)
        keys.append(key)

    def source(key: str) -> str:
        within = any(f"{key}.".startswith(f"{k}.") or k.startswith(f"{key}.") for k in keys)
        return "override" if within else str(path)

    return validated(_interpolated(tree, source), source)


def changed(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """The recipe with `key=value` overrides; raises RecipeError as `load_recipe` does."""
    tree = recipe.model_dump(mode="json")
    for override in overrides:
        _put(tree, *_parsed(override))
    return validated(tree, lambda _: "override")


def dump_recipe(recipe: Recipe) -> str:
    """YAML of every key of `recipe`; `load_recipe` gives an equal recipe back."""
    tree = _literal(recipe.model_dump(mode="json"))
    return OmegaConf.to_yaml(OmegaConf.create(tree))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in the YAML file `path` as nested dicts and lists, `${...}` still as written.

    Raises RecipeError if the file is missing, unreadable, no mapping, has a key twice or constructs
    objects.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: expected UTF-8 text, byte {error.start} is not") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        root = _checked_tags(text, str(path))
        if root is None:
            return {}
        if not isinstance(root, yaml.MappingNode):
            kind = "a list" if isinstance(root, yaml.SequenceNode) else shown(text.strip())
            raise RecipeError(f"{path}: expected a mapping of keys to values, found {kind}")
        tree = OmegaConf.to_container(OmegaConf.create(text))
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{path}: {_yaml_problem(error)}") from None
    except OmegaConfBaseException as error:
        raise RecipeError(f"{path}: {_first_line(error)}") from None
    assert isinstance(tree, dict)
    return tree  # type: ignore[return-value]


def _parsed(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    key = re.sub(r"\[(\d+)\]", r".\1", key.strip())
    if not equals or not all(key.split(".")):
        raise RecipeError(f"override: found {shown(override)}, expected key=value")
    try:
        _checked_tags(text, f"override: {key}")
        config = OmegaConf.from_dotlist([f"value={text}"])
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"override: {key}: found {shown(text)}, {_yaml_problem(error)}") from None
    except OmegaConfBaseException as error:
        raise RecipeError(f"override: {key}: found {shown(text)}, {_first_line(error)}") from None
    container = OmegaConf.to_container(config)
    assert isinstance(container, dict)
    return key, container["value"]


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set `key` in `tree`; a list that the file leaves out starts as its default."""
    parts = key.split(".")
    node: Any = tree
    default: Any = Recipe().model_dump(mode="json")
    for depth, part in enumerate(parts):
        default = default.get(part) if isinstance(default, Mapping) else None
        last = depth == len(parts) - 1
        if isinstance(node, list):
            where = ".".join(parts[:depth])
            if not part.isdecimal() or int(part) > len(node):
                raise RecipeError(
                    f"override: {key}: {where} is a list of {len(node)}, "
                    f"found {shown(part)}, expected an index from 0 to {len(node)}"
                )
            if int(part) == len(node):
                node.append({})
            index: Any = int(part)
        elif isinstance(node, dict):
            index = part
        else:
            where = ".".join(parts[:depth])
            raise RecipeError(f"override: {key}: {where} is {shown(node)} and has no keys")
        if last:
            node[index] = value
        elif isinstance(node, dict) and node.get(index) is None:
            node[index] = default if isinstance(default, list) else {}
        node = node[index]


def _interpolated(tree: dict[str, Any], source: Callable[[str], str]) -> dict[str, Any]:
    try:
        filled = OmegaConf.to_container(OmegaConf.create(tree), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = str(error.full_key or "").replace("[", ".").replace("]", "")
        raise RecipeError(f"{source(key)}: {key}: {_first_line(error)}") from None
    assert isinstance(filled, dict)
    return filled  # type: ignore[return-value]


def _checked_tags(text: str, where: str) -> yaml.Node | None:
    """Parse tree of `text`, None when empty; raises RecipeError at a tag that is no plain data."""
    root: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    nodes, seen = [root] if root else [], set()
    while nodes:
        node = nodes.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        prefix, _, kind = node.tag.rpartition("tag:yaml.org,2002:")
        if prefix or kind not in _PLAIN_TAGS:
            raise RecipeError(
                f"{where}: line {node.start_mark.line + 1}: found the tag {shown(node.tag)}, "
                "expected plain values: a recipe constructs no objects"
            )
        if isinstance(node, yaml.MappingNode):
            nodes += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value
    return root


def _yaml_problem(error: yaml.YAMLError | RecursionError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return "nested too deeply" if isinstance(error, RecursionError) else _first_line(error)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _literal(value: Any) -> Any:
    """`value` with `${` in its texts escaped, so that OmegaConf reads them unchanged."""
    if isinstance(value, dict):
        return {key: _literal(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_literal(part) for part in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    return value
