"""The documents say what the code does: recipe keys, commands, overrides, links, import arrows."""

import ast
import re
import shlex
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import typer
import yaml

from fastjepa.cli import app
from fastjepa.config.load import load_recipe
from fastjepa.config.resolve import resolve
from fastjepa.config.schema import Recipe, Section

ROOT = Path(__file__).parents[1]
DOCS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def _rows(path: Path) -> list[list[str]]:
    """Cells of every table row of a document, header lines left out."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [row for row in rows if not set(row[0]) <= {"-"}]


def _keys(section: type[Section], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted key, annotation and default of everything a recipe may hold."""
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        parts = get_args(field.annotation) or (field.annotation,)
        below = [p for p in parts if isinstance(p, type) and issubclass(p, Section)]
        listed = get_origin(field.annotation) is tuple
        if not below or listed or type(None) in parts:
            yield key, field.annotation, ... if field.is_required() else field.default
        if below:
            yield from _keys(below[0], f"{key}.N." if listed else f"{key}.")


def _is_default(text: str, default: object) -> bool:
    if default is ...:
        return text == "required"
    if isinstance(default, tuple) and any(isinstance(part, Section) for part in default):
        return text == "the released groups"
    if isinstance(default, Section):
        return text == "see below"
    found = yaml.safe_load(text.strip("`"))
    if isinstance(default, float) and isinstance(found, str):
        found = float(found)
    wanted = list(default) if isinstance(default, tuple) else default
    return bool(found == (str(wanted) if isinstance(wanted, Path) else wanted))


def test_every_key_of_the_recipe_is_documented_with_its_default() -> None:
    documented = {
        row[0].strip("`"): row[1:]
        for row in _rows(ROOT / "docs/recipe.md")
        if row[0].startswith("`")
    }
    keys = list(_keys(Recipe))
    assert {"masks.video.N.max_keep", "data.image.N.weight", "objective.ramp.end"} <= {
        key for key, _, _ in keys
    }
    assert documented.keys() == {key for key, _, _ in keys}
    for key, annotation, default in keys:
        kind, shown, meaning = documented[key]
        assert _is_default(shown, default), f"{key}: documented {shown}, default {default!r}"
        assert kind
        assert meaning
        for choice in _choices(annotation):
            assert f"`{choice}`" in kind, f"{key}: {choice} is not among {kind}"
        nullable = type(None) in get_args(annotation)
        assert ("null" in kind) == nullable, f"{key}: {kind}"


def _choices(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(c for part in get_args(annotation) for c in _choices(part))
    return ()


def test_every_command_is_in_the_readme_and_no_other() -> None:
    group = typer.main.get_command(app)
    known = set()
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        below = getattr(command, "commands", None)
        known |= {f"{name} {sub}" for sub in below} if below else {name}
    table = {
        " ".join(
            word for word in row[0].strip("`").split()[1:] if word.islower() and "." not in word
        )
        for row in _rows(ROOT / "README.md")
        if row[0].startswith("`fastjepa ")
    }
    assert table == known


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_train_commands_in_the_documents_are_good_recipes(path: Path) -> None:
    for line in re.findall(r"^ {4}(fastjepa train .*)$", path.read_text("utf-8"), re.MULTILINE):
        recipe, *rest = shlex.split(line, comments=True)[2:]
        overrides = [word for word in rest if "=" in word]  # and options such as --nproc 2
        resolve(load_recipe(ROOT / recipe, overrides))


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_recipes_in_the_documents_are_good(path: Path, tmp_path: Path) -> None:
    for text in re.findall(r"```yaml\n(.*?)```", path.read_text("utf-8"), re.DOTALL):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(text, encoding="utf-8")
        assert resolve(load_recipe(recipe)).notes == ()


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_links_and_named_files_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (path.parent / target).exists(), target
    for named in re.findall(
        r"`((?:fastjepa|kernels|benchmarks|docs|tests|configs)/[\w./-]+)`", text
    ):
        if not re.search(r"[A-Z]{4}|/results$", named):
            assert (ROOT / named).exists(), named


def _imported(file: Path) -> set[str]:
    """The rooms that a file imports: `fastjepa.X` as X, `fastjepa_kernels`, the package itself."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
            if node.module == "fastjepa":
                names = [f"fastjepa.{alias.name}" for alias in node.names]
        for name in names:
            top, _, rest = name.partition(".")
            if top == "fastjepa_kernels":
                found.add(top)
            elif top == "fastjepa" and rest:
                found.add(rest.partition(".")[0])
    return found


def test_imports_go_only_where_contributing_says() -> None:
    rooms = {
        row[0].strip("`"): set(re.findall(r"`(\w+)`", row[2]))
        for row in _rows(ROOT / "CONTRIBUTING.md")
        if row[0].startswith("`")
    }
    package = ROOT / "fastjepa"
    where = {name: package / f"{name}.py" for name in ("presets", "durable")}
    where["fastjepa_kernels"] = ROOT / "kernels/fastjepa_kernels"
    folders = {path.name for path in package.iterdir() if (path / "__init__.py").exists()}
    assert folders <= rooms.keys(), "a room is missing in CONTRIBUTING.md"
    for room, allowed in rooms.items():
        place = where.get(room, package / room)
        for file in [place] if place.is_file() else sorted(place.rglob("*.py")):
            beyond = _imported(file) - allowed - {room}
            assert not beyond, f"{file.relative_to(ROOT)} imports {', '.join(sorted(beyond))}"
    importers = [f for f in sorted(package.rglob("*.py")) if "cli" in _imported(f)]
    assert importers == []


def test_no_op_folder_makes_kernels_a_package() -> None:
    assert not (ROOT / "kernels/__init__.py").exists()
    ops = [path.parent for path in (ROOT / "kernels/fastjepa_kernels").glob("*/op.py")]
    assert ops
    for op in ops:
        assert {"__init__.py", "kernel.py", "reference.py"} <= {file.name for file in op.iterdir()}
