"""Who may import whom: the arrows of the architecture, read from the source."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What each part may import of our own packages, itself aside. `fastjepa` is the version number,
# and `fastjepa.load` when it is first asked for.
MAY_IMPORT: dict[str, set[str]] = {
    "fastjepa_kernels": set(),
    "fastjepa": {"fastjepa.pretrained"},
    "fastjepa.presets": set(),
    "fastjepa.durable": set(),
    "fastjepa.observe": {"fastjepa_kernels", "fastjepa.durable"},
    "fastjepa.data": {"fastjepa.durable"},
    "fastjepa.config": {"fastjepa.presets"},
    "fastjepa.checkpoint": {"fastjepa", "fastjepa.durable", "fastjepa.presets"},
    "fastjepa.masking": {"fastjepa_kernels"},
    "fastjepa.model": {"fastjepa_kernels", "fastjepa.presets"},
    "fastjepa.objective": {"fastjepa_kernels"},
    "fastjepa.optim": {"fastjepa_kernels"},
    "fastjepa.bench": {
        "fastjepa_kernels", "fastjepa.data", "fastjepa.durable", "fastjepa.masking",
        "fastjepa.model", "fastjepa.observe", "fastjepa.presets", "fastjepa.train",
    },
    "fastjepa.features": {
        "fastjepa.checkpoint", "fastjepa.data", "fastjepa.durable", "fastjepa.model",
        "fastjepa.observe",
    },
    "fastjepa.planning": {"fastjepa.observe"},
    "fastjepa.probes": {
        "fastjepa.checkpoint", "fastjepa.data", "fastjepa.durable", "fastjepa.features",
        "fastjepa.model", "fastjepa.observe",
    },
    "fastjepa.train": {
        "fastjepa_kernels", "fastjepa.checkpoint", "fastjepa.data", "fastjepa.masking",
        "fastjepa.model", "fastjepa.objective", "fastjepa.observe", "fastjepa.optim",
    },
}  # fmt: skip

# Only these know the recipe; all else takes plain arguments.
KNOW_THE_RECIPE = {
    "fastjepa.config", "fastjepa.build", "fastjepa.cli", "fastjepa.explain", "fastjepa.estimate",
    "fastjepa.planner",
    "fastjepa.cli_plan", "fastjepa.bench_step", "fastjepa.recipe_parts", "fastjepa.roles",
    "fastjepa.rank_memory", "fastjepa.out_of_memory", "fastjepa.build_data",
}  # fmt: skip

# Optional or heavy: in one place, and only when called.
HEAVY = ("deepspeed", "nvidia", "wandb", "matplotlib", "transformers", "triton", "flash_attn",
         "pyarrow", "psutil", "torch.utils.tensorboard", "sklearn", "fsspec")  # fmt: skip


def sources() -> Iterator[tuple[str, Path]]:
    """Every module of ours by its dotted name."""
    for folder, package in ((ROOT, "fastjepa"), (ROOT / "kernels", "fastjepa_kernels")):
        for path in sorted((folder / package).rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(source: str, *, module: str, at_import: bool = False) -> set[str]:
    """Modules that a source imports, anywhere or only while it is itself imported."""
    found: set[str] = set()
    todo: list[ast.AST] = [ast.parse(source)]
    while todo:
        node = todo.pop()
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if at_import and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            inside = module.removesuffix(".__init__").split(".")
            up = node.level - module.endswith(".__init__")
            parent = ".".join(inside[: len(inside) - up]) if node.level else ""
            base = ".".join(part for part in (parent, node.module) if part)
            found.add(base)
            # `from fastjepa import presets` names a module, too.
            found |= {f"{base}.{alias.name}" for alias in node.names if base == "fastjepa"}
        todo += list(ast.iter_child_nodes(node))
    return found


def imports_of(module: str, *, at_import: bool = False) -> set[str]:
    path = MODULES[module]
    name = f"{module}.__init__" if path.name == "__init__.py" else module
    return imports(path.read_text(), module=name, at_import=at_import)


def part(module: str) -> str:
    """The part of the architecture that a module of ours belongs to."""
    names = module.split(".")
    return names[0] if names[0] == "fastjepa_kernels" else ".".join(names[:2])


def ours(modules: set[str]) -> set[str]:
    found = {part(m) for m in modules if m.split(".")[0] in ("fastjepa", "fastjepa_kernels")}
    real = {part(name) for name, _ in sources()}
    return {name if name in real else "fastjepa" for name in found}


MODULES = dict(sources())


def test_the_parser_sees_imports_of_every_form() -> None:
    source = (
        "import torch, fastjepa.data.loader\nfrom fastjepa import presets\n"
        "from .blocks import covered\nclass A:\n  import av\n"
        "def f():\n  from fastjepa.train.step import forward\n"
    )
    inside = imports("from .data import loader\nfrom ..x import y", module="fastjepa.a.__init__")
    assert inside == {"fastjepa.a.data", "fastjepa.x"}
    seen = imports(source, module="fastjepa.masking.batch")
    assert ours(seen) == {
        "fastjepa", "fastjepa.data", "fastjepa.presets", "fastjepa.train", "fastjepa.masking",
    }  # fmt: skip
    early = imports(source, module="fastjepa.masking.batch", at_import=True)
    assert "av" in early
    assert "fastjepa.train.step" not in early


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_its_part_may(module: str) -> None:
    found = ours(imports_of(module)) - {part(module)}
    if part(module) in MAY_IMPORT:
        surplus = found - MAY_IMPORT[part(module)]
        assert not surplus, f"{module} imports {', '.join(sorted(surplus))}"
    if part(module) not in KNOW_THE_RECIPE:
        assert "fastjepa.config" not in found, f"{module} knows the recipe"


def test_every_package_has_its_rule() -> None:
    packages = {part(name) for name, path in MODULES.items() if path.name == "__init__.py"}
    assert packages <= MAY_IMPORT.keys()


def test_the_kernels_need_torch_and_triton_alone() -> None:
    allowed = {"torch", "triton", "fastjepa_kernels", *sys.stdlib_module_names}
    for module in MODULES:
        if part(module) == "fastjepa_kernels":
            roots = {name.split(".")[0] for name in imports_of(module)}
            assert roots <= allowed, module


def test_the_recipe_needs_no_torch() -> None:
    for module in MODULES:
        if part(module) in ("fastjepa.config", "fastjepa.presets"):
            names = imports_of(module)
            assert not any(name.split(".")[0] in ("torch", "numpy") for name in names), module


@pytest.mark.parametrize("library", HEAVY)
def test_heavy_libraries_are_imported_when_called(library: str) -> None:
    early = [
        module
        for module in MODULES
        for name in imports_of(module, at_import=True)
        if name == library or name.startswith(f"{library}.")
    ]
    # A Triton kernel cannot be written without it; nothing but its op imports such a file.
    assert [m for m in early if not (library == "triton" and m.endswith(".kernel"))] == []
