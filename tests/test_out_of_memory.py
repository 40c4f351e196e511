"""Memory that runs out: one line, whose keys make the run fit under the same limit."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastjepa.config.load import changed, load_recipe
from fastjepa.config.resolve import resolve
from fastjepa.observe.memory import MemoryLimit
from fastjepa.out_of_memory import remedies
from fastjepa.rank_memory import bytes_of_rank

ROOT = Path(__file__).parents[1]
LARGE = ROOT / "configs/vitG16/pretrain-256px-16f.yaml"
GIB = 2**30

# A run of the command in what is left of its address space: 1 GiB beside the libraries.
LIMITED = """
import resource, sys
from fastjepa import build, cli, out_of_memory
import av, psutil
held = psutil.Process().memory_info().vms
resource.setrlimit(resource.RLIMIT_AS, (held + 2**30, resource.RLIM_INFINITY))
cli.main(sys.argv[1:])
"""
RECIPE = """
run: {{folder: {folder}}}
model: {{name: vit_tiny, depth: 6, predictor: {{width: 192, depth: 2, heads: 6}}}}
data: {{image: package:sklearn/datasets/images, crop: 160, image_batch: 384, workers: 0}}
train: {{steps: 1}}
optim: {{warmup: 0}}
objective: {{ramp: null}}
engine: {{kind: torch, dtype: float32, device: cpu, threads: 1}}
observe: {{pictures: false}}
"""


def limited(recipe: Path, *overrides: str) -> tuple[int, str]:
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED, "train", str(recipe), *overrides],
        cwd=ROOT, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    return ended.returncode, ended.stderr


def test_the_keys_that_are_named_make_the_run_fit(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=tmp_path / "run"))
    code, told = limited(recipe)
    assert code == 2, told
    (line,) = told.splitlines()
    assert line.startswith("error: out of memory: a rank plans about ")
    assert "its address space has 1" in line  # a GiB, less what was taken since
    way = re.findall(r"(?:with|or) ((?:[\w.]+=\S+ ?)+)\(about", line)[-1]
    assert "optim.accumulate=" in way
    code, told = limited(recipe, *way.split())
    assert code == 0, told


@pytest.mark.parametrize(("gib", "ranks"), [(70, 8), (40, 8), (24, 64)])
def test_what_is_named_is_planned_to_fit(gib: int, ranks: int) -> None:
    chosen = load_recipe(LARGE, ["engine.kind=deepspeed", "engine.zero_stage=1"])
    told = remedies(chosen, ranks=ranks, limit=MemoryLimit(gib * GIB, "the GPU has"), on_host=False)
    ways = re.findall(r"(?:with|or) ((?:[\w.]+=\S+ ?)+)\(about", told)
    assert ways, told
    for way in ways:
        other = changed(chosen, way.split())
        assert bytes_of_rank(other, resolve(other), ranks=ranks) <= 0.9 * gib * GIB
        assert other.data.batch * other.optim.accumulate == chosen.data.batch


@pytest.mark.parametrize(
    ("own", "ranks", "never"),
    [
        (["engine.mask_groups=in_turn"], 1, "engine.offload=true"),
        (["engine.kind=deepspeed", "engine.compile=blocks"], 4, "engine.zero_stage=3"),
    ],
)
def test_keys_that_the_recipe_excludes_are_left_out(own: list[str], ranks: int, never: str) -> None:
    chosen = load_recipe(ROOT / "configs/vitl16/pretrain-256px-16f.yaml", own)
    for gib in (1, 8, 15):
        limit = MemoryLimit(gib * GIB, "the GPU has")
        told = remedies(chosen, ranks=ranks, limit=limit, on_host=False)
        assert told.startswith("a rank plans about ")
        assert never not in told
    assert "it would fit with" in told


def test_where_nothing_helps_that_is_said() -> None:
    told = remedies(
        load_recipe(LARGE), ranks=1, limit=MemoryLimit(GIB, "the machine has"), on_host=True
    )
    assert told.endswith("no key of the recipe makes it fit: more ranks, or a smaller model")
