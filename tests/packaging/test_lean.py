"""What an import brings with it, and what the distribution holds."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPTIONAL = (
    "triton", "deepspeed", "nvidia.dali", "wandb", "matplotlib", "tensorboard", "av", "pyarrow",
    "transformers", "flash_attn", "sklearn", "psutil",
)  # fmt: skip


def modules_after(statement: str) -> set[str]:
    """Everything a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_an_encoder_needs_none_of_the_optional_libraries() -> None:
    loaded = modules_after(
        "from fastjepa.model import vit_tiny\nimport torch\n"
        "vit_tiny(depth=1, levels=[0]).features(torch.zeros(1, 3, 1, 32, 32))"
    )
    assert not loaded & set(OPTIONAL)
    parts = {".".join(name.split(".")[:2]) for name in loaded if name.startswith("fastjepa")}
    assert not parts & {"fastjepa.data", "fastjepa.train", "fastjepa.config", "fastjepa.observe"}


def test_the_ops_need_nothing_of_fastjepa() -> None:
    loaded = modules_after("import fastjepa_kernels")
    assert not any(name.split(".")[0] == "fastjepa" for name in loaded)
    assert not loaded & set(OPTIONAL)


def test_the_recipe_is_read_without_torch() -> None:
    assert "torch" not in modules_after("import fastjepa.config.load, fastjepa.config.resolve")


def test_kernels_is_a_folder_and_no_package() -> None:
    """Hugging Face owns the import name `kernels`."""
    assert (ROOT / "kernels" / "fastjepa_kernels" / "__init__.py").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_distribution_holds_both_packages_and_nothing_else() -> None:
    setuptools = pytest.importorskip("setuptools")
    find = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"][
        "find"
    ]
    assert find["namespaces"] is False
    found = {
        package
        for where in find["where"]
        for package in setuptools.find_packages(str(ROOT / where), include=find["include"])
    }
    assert {"fastjepa", "fastjepa_kernels"} <= found
    assert {package.split(".")[0] for package in found} == {"fastjepa", "fastjepa_kernels"}
    folders = {
        ".".join(path.parent.relative_to(base).parts)
        for base, package in ((ROOT, "fastjepa"), (ROOT / "kernels", "fastjepa_kernels"))
        for path in (base / package).rglob("*.py")
    }
    assert folders == found, "a folder without __init__.py would be left out"


def test_types_are_shipped() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]
    for package, folder in (("fastjepa", ROOT), ("fastjepa_kernels", ROOT / "kernels")):
        assert "py.typed" in data[package]
        assert (folder / package / "py.typed").is_file()


def test_torch_is_pinned_and_triton_left_free() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    assert any(pin.startswith("torch==") for pin in pins)
    assert not any(pin.startswith("triton") for pin in pins)
