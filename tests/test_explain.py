"""`fastjepa config show`: every number of a recipe, checked against the code that it stands for."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastjepa.build import build_jepa
from fastjepa.config.load import load_recipe
from fastjepa.config.resolve import resolve
from fastjepa.config.schema import Recipe
from fastjepa.estimate import DRAWN_STEPS, Estimate, estimate
from fastjepa.explain import Section, as_json, as_table, as_text, explain
from fastjepa.recipe_parts import mask_maker

CONFIGS = Path(__file__).parents[1] / "configs"
PRESETS = sorted(p for p in CONFIGS.rglob("*.yaml") if p.parent.name != "launch")
# The demo with the numbers that the tests below count on.
FIXED = (
    "data.frames=8", "data.fps=8", "data.crop=112", "data.batch=4", "data.image_batch=8",
    "data.image_share=0.25", "data.mix=alternate", "optim.ema.half_life=9", "train.steps=300",
    "train.checkpoint_every=100", "engine.dtype=float32",
)  # fmt: skip


def demo(*overrides: str) -> Recipe:
    return load_recipe(CONFIGS / "demo.yaml", (*FIXED, *overrides))


def sections(recipe: Recipe) -> list[Section]:
    return explain(recipe, resolve(recipe))


def value(recipe: Recipe, title: str, name: str) -> str:
    (section,) = (s for s in sections(recipe) if s.title == title)
    return dict(section.rows)[name]


def costs(*overrides: str) -> Estimate:
    recipe = demo(*overrides)
    return estimate(recipe, resolve(recipe))


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_every_preset_is_explained_in_full(path: Path) -> None:
    found = sections(load_recipe(path))
    assert [s.title for s in found][:8] == [
        "Model", "Video", "Images", "Objective", "Schedule", "Optimizer step",
        "Compute of an optimizer step", "Memory (estimate)",
    ]  # fmt: skip
    assert all(name and text for s in found for name, text in s.rows)


@pytest.mark.parametrize("overrides", [(), ("objective.deep=false",), ("model.depth=3",)])
def test_parameters_are_those_of_the_built_networks(overrides: tuple[str, ...]) -> None:
    recipe = demo(*overrides)
    jepa = build_jepa(recipe, resolve(recipe), torch.device("cpu"))
    numbers = costs(*overrides)
    assert numbers.encoder_parameters == sum(p.numel() for p in jepa.encoder.parameters())
    assert numbers.predictor_parameters == sum(p.numel() for p in jepa.predictor.parameters())
    assert f"({numbers.encoder_parameters:,})" in value(recipe, "Model", "parameters of the target")


def test_token_counts_are_means_over_the_masks_of_the_run() -> None:
    recipe = demo()
    resolved = resolve(recipe)
    assert resolved.video is not None
    maker = mask_maker(recipe, resolved.video)
    drawn = [maker(step) for step in range(DRAWN_STEPS)]
    video = costs().parts["video"]
    for group in range(2):
        context = [masks.context[group].shape[1] for masks in drawn]
        assert video.context[group] == pytest.approx(sum(context) / len(context))
    assert value(recipe, "Video", "token grid").startswith("4 x 7 x 7")
    assert value(recipe, "Video", "tokens a clip") == "196"
    mean = f"context {video.context[1]:.0f} ({video.context[1] / 196:.0%})"
    assert mean in value(recipe, "Video", "mask group 1")


def test_a_complement_of_every_token_still_fits_the_grid() -> None:
    group = "{num_blocks: 2, spatial_scale: [0.3, 0.5], full_complement: true}"
    video = costs(f"masks.video=[{group}]").parts["video"]
    assert video.context[0] + video.predicted[0] == pytest.approx(196)


def test_operations_follow_mix_and_accumulation() -> None:
    alternate, both = costs("data.mix=alternate"), costs("data.mix=accumulate")
    video, image = (alternate.parts[name].flops.total for name in ("video", "image"))
    assert alternate.flops == pytest.approx(0.75 * video + 0.25 * image)
    assert both.flops == pytest.approx(video + image)
    assert costs("optim.accumulate=3").flops == pytest.approx(3 * alternate.flops)
    only = costs("data.image=[]")
    assert only.flops == only.parts.pop("video").flops.total
    assert not only.parts


def test_memory_is_the_larger_part_and_follows_the_recipe() -> None:
    numbers = costs()
    parts = (part.memory for part in numbers.parts.values())
    assert numbers.memory == max(parts, key=lambda memory: memory.total)
    trained = numbers.encoder_parameters + numbers.predictor_parameters
    assert numbers.memory.states.moments == 8 * trained
    assert numbers.memory.states.ema == 4 * numbers.encoder_parameters
    assert costs("engine.dtype=bfloat16").memory.states.casts == 0
    compiled = costs("engine.dtype=bfloat16", "engine.compile=blocks")
    assert compiled.memory.states.casts == 2 * trained

    def held(*overrides: str) -> int:
        return costs(*overrides).memory.activations.total

    assert held("engine.dtype=bfloat16") < held()
    assert held("model.checkpointing=true") < held()
    kept = held("model.checkpointing=true", "model.keep_attention=true")
    assert held("model.checkpointing=true") < kept < held()
    assert held("model.checkpointing=true") < held("model.checkpointing=encoder") < held()
    assert held("model.attention=math") > held()
    assert held("engine.mask_groups=in_turn") < held()
    packed = costs("engine.micro_batches=packed", "data.mix=accumulate", "optim.accumulate=2")
    assert packed.memory.activations.total == sum(
        2 * part.memory.activations.total for part in packed.parts.values()
    )


def test_schedule_gives_the_values_that_steps_will_have() -> None:
    cooldown = load_recipe(CONFIGS / "vitl16/cooldown-256px-64f.yaml")
    assert value(cooldown, "Schedule", "learning rate").endswith("0.0001208 at the last step")
    assert value(cooldown, "Schedule", "EMA half-life") == "923.8 steps"
    assert value(demo(), "Schedule", "EMA half-life") == "9 steps"
    still = demo("optim.ema={momentum: 1.0}")
    assert value(still, "Schedule", "EMA half-life") == "endless: the target never moves"
    moving = demo("optim.ema={momentum: 0.5, final_momentum: 1.0}")
    assert value(moving, "Schedule", "EMA momentum").startswith("0.5 toward 1;")
    assert value(demo("guard.sigma=3"), "Schedule", "guard").count("mean + 3 std") == 1
    assert "constant" in value(demo(), "Schedule", "weight decay")
    decaying = demo("optim.final_weight_decay=0.4")
    assert "toward 0.4" in value(decaying, "Schedule", "weight decay")


@pytest.mark.parametrize(
    ("overrides", "method"),
    [
        (("objective.dense=false", "objective.deep=false"), "V-JEPA 2"),
        (("objective.deep=false",), "V-JEPA 2 + dense"),
        (("objective.dense=false",), "V-JEPA 2 + deep"),
        ((), "V-JEPA 2 + dense + deep (V-JEPA 2.1)"),
    ],
)
def test_the_method_has_its_name(overrides: tuple[str, ...], method: str) -> None:
    assert value(demo(*overrides), "Objective", "method") == method


def test_sources_show_their_share_of_the_draws() -> None:
    recipe = demo("data.video=[{path: a, weight: 3}, {path: b}]")
    (section,) = (s for s in sections(recipe) if s.title == "Data")
    assert [text for name, text in section.rows if name == "video"] == [
        "a (75.0% of the draws)",
        "b (25.0% of the draws)",
    ]


def test_notes_of_the_recipe_are_shown() -> None:
    found = sections(demo("train.checkpoint_every=1000"))
    assert found[-1].title == "Notes"
    assert "one checkpoint, at the end" in found[-1].rows[0][1]
    assert sections(demo())[-1].title != "Notes"


def test_piped_text_has_one_line_a_row_and_a_terminal_shows_the_same_words() -> None:
    found = sections(demo("data.video='/clips/[red]/*.mp4'"))
    lines = as_text(found).splitlines()
    assert len([line for line in lines if line.startswith("  ")]) == sum(len(s.rows) for s in found)
    assert any("/clips/[red]/*.mp4" in line for line in lines)
    console = Console(width=300, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(as_table(found))
    shown = console.export_text()
    for section in found:
        assert section.title in shown
        assert all(text in shown for _, text in section.rows)


def test_json_holds_plain_numbers() -> None:
    recipe = demo()
    tree = json.loads(as_json(recipe, resolve(recipe)))
    assert tree["recipe"]["train"]["steps"] == 300
    assert tree["resolved"]["streams"]["video"]["tokens"] == 196
    assert tree["estimate"]["encoder_parameters"] == costs().encoder_parameters
    assert math.isclose(tree["estimate"]["flops"], costs().flops)
    assert tree["estimate"]["parts"]["video"]["memory"]["states"]["weights"] == (
        costs().memory.states.weights
    )
