"""A step's operations from its own masks: on average those that the planner draws."""

from dataclasses import replace
from pathlib import Path

import pytest

from fastjepa.config.load import load_recipe
from fastjepa.config.resolve import resolve
from fastjepa.estimate import DRAWN_STEPS, StreamCosts
from fastjepa.recipe_parts import mask_maker, network_numbers
from fastjepa.train.work import Work

DEMO = Path(__file__).parents[2] / "configs/demo.yaml"


@pytest.mark.parametrize("name", ["video", "image"])
def test_a_mean_step_is_the_planners_without_the_recompute(name: str) -> None:
    recipe = load_recipe(DEMO, ["model.checkpointing=true"])
    resolved = resolve(recipe)
    stream = resolved.streams[name]
    work = Work(*network_numbers(recipe, resolved), peak=None)
    maker = replace(mask_maker(recipe, stream), weigh=False)
    taken = [
        work.flops(
            maker(step), clips=stream.clips, tokens=stream.tokens, image=stream.modality == "image"
        )
        for step in range(DRAWN_STEPS)
    ]
    planned = StreamCosts(recipe, resolved).part(stream).flops
    assert planned.recompute > 0
    assert sum(taken) / len(taken) == pytest.approx(planned.total - planned.recompute, rel=1e-9)
