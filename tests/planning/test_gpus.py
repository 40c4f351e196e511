"""The GPU table: every entry is whole, and a wrong name is answered with the right ones."""

from pathlib import Path

import pytest

from fastjepa.planning.gpus import GPUS, gpu_named


@pytest.mark.parametrize("name", ["a100", "h100", "h200", "b200"])
def test_a_gpu_has_its_figures_and_where_they_are_from(name: str) -> None:
    gpu = gpu_named(name.upper())
    assert gpu == GPUS[name]
    assert "data sheet" in gpu.source
    assert 1e14 < gpu.bf16_flops < 1e16
    assert 4e10 < gpu.memory < 1e12
    assert 1e12 < gpu.memory_bandwidth < 1e13
    assert gpu.network < gpu.nvlink < gpu.memory_bandwidth


def test_an_unknown_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--gpu: expected one of a100, h100, .*, got 'v100'"):
        gpu_named("v100")


def test_the_page_on_planning_has_these_figures() -> None:
    page = (Path(__file__).parents[2] / "docs/planning.md").read_text(encoding="utf-8")
    for name, gpu in GPUS.items():
        row = (
            f"| `{name}` | {gpu.bf16_flops / 1e12:g} TFLOP/s | {gpu.memory / 1e9:g} GB | "
            f"{gpu.memory_bandwidth / 1e12:g} TB/s | {gpu.nvlink / 1e9:g} GB/s | "
            f"{gpu.network / 1e9:g} GB/s | {gpu.source} |"
        )
        assert row in page
