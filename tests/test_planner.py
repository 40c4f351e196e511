"""`fastjepa plan`: parameters, operations and bytes against the networks they stand for, and every
recipe that comes with the package."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from fastjepa.build import build_jepa
from fastjepa.config.load import load_recipe
from fastjepa.config.resolve import resolve
from fastjepa.config.streams import Stream
from fastjepa.estimate import DRAWN_STEPS, StreamCosts
from fastjepa.plan_report import as_json, as_table, as_text, tables
from fastjepa.planner import Cluster, Plan, make_plan
from fastjepa.planning.gpus import GPUS, gpu_named
from fastjepa.recipe_parts import mask_maker

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
RECIPES = [CONFIGS / "demo.yaml", *sorted(CONFIGS.rglob("*-*px-*f.yaml"))]
# Two ranks' worth of a small model, in which images cost a fifth of clips.
SMALL = ("model.attention=math", "data.crop=96", "data.frames=4", "model.depth=2",
         "model.predictor.depth=1",
         "data.image_batch=6")  # fmt: skip
EVEN = ("ranks.rank_ratio=0.5", "ranks.balance=work")


@cache
def plan(file: str, *overrides: str, gpus: int = 8) -> Plan:
    recipe = load_recipe(CONFIGS / file, overrides)
    cluster = Cluster(gpus=gpus, gpu=gpu_named("h100"))
    return make_plan(recipe, resolve(recipe), cluster)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_every_recipe_is_planned_in_full(path: Path) -> None:
    found = plan(str(path.relative_to(CONFIGS)), gpus=64)
    text = as_text(tables(found))
    assert all(cell for grid in tables(found) for row in grid.rows for cell in row[:2])
    assert "ZeRO 3" in text
    for layout in found.layouts.values():
        assert layout.states.total > 0
        assert set(layout.largest) == {"video", "image"}
    totals = [found.layouts[f"zero{stage}"].states.total for stage in range(4)]  # type: ignore[index]
    assert all(more > less for more, less in pairwise(totals))


@pytest.mark.parametrize(
    ("folder", "encoder", "predictor"),
    [
        ("vitb16", 86_833_152, 26.3),
        ("vitl16", 304_680_960, 50.3),
        ("vitg16", 1_013_267_968, 55.4),
        ("vitG16", 1_845_216_768, 59.4),
    ],
)
def test_states_are_those_of_the_released_sizes(
    folder: str, encoder: int, predictor: float
) -> None:
    found = plan(f"{folder}/pretrain-256px-16f.yaml", gpus=64)
    assert found.numbers.encoder_parameters == encoder
    guesser = found.numbers.predictor_parameters
    assert round(guesser / 1e6, 1) == predictor
    assert found.layouts["zero1"].states.total == pytest.approx(
        encoder * (6 + 16 / 64) + guesser * (4 + 12 / 64), rel=1e-6
    )
    assert found.layouts["torch"].states.ema == 4 * encoder


@pytest.mark.parametrize(
    ("folder", "video", "image"),
    [("vitb16", 164, 14), ("vitl16", 231, 23), ("vitg16", 559, 67), ("vitG16", 488, 61)],
)
def test_a_released_step_costs_what_was_counted_on_the_official_code(
    folder: str, video: float, image: float
) -> None:
    """Operations in 10^12 of a video rank's and of an image rank's step."""
    parts = plan(f"{folder}/pretrain-256px-16f.yaml", gpus=64).numbers.parts
    assert parts["video"].flops.total / 1e12 == pytest.approx(video, rel=0.03)
    assert parts["image"].flops.total / 1e12 == pytest.approx(image, rel=0.09)


def test_the_largest_batch_fits_and_one_more_would_not() -> None:
    """Of the masks drawn for it, those of the largest step."""
    found = plan("vitl16/pretrain-256px-16f.yaml", gpus=64)
    recipe = load_recipe(CONFIGS / "vitl16/pretrain-256px-16f.yaml")
    costs = StreamCosts(recipe, resolve(recipe))
    stream = resolve(recipe).streams["video"]
    for layout in ("torch", "zero2"):
        one = found.layouts[layout]
        room = found.cluster.usable - one.states.total - one.gathered
        for checkpointing in (False, True):
            most = one.largest["video"][checkpointing]
            drawn = costs.tokens(replace(stream, clips=min(64, 1 << (most.bit_length() - 1))))
            sizes = [
                costs.activations(
                    replace(stream, clips=clips), drawn, checkpointing=checkpointing,
                    layout=layout,
                ).total
                for clips in (most, most + 1)
            ]  # fmt: skip
            assert sizes[0] <= room < sizes[1]
    assert one.largest["video"][True] > one.largest["video"][False] > 0


def test_a_model_too_large_for_one_gpu_has_no_batch_and_fits_once_it_is_split() -> None:
    wide = ("model.width=4096", "model.heads=64", "model.mlp_width=16384")
    found = plan("vitG16/pretrain-256px-16f.yaml", *wide, gpus=64)
    assert found.layouts["torch"].largest["video"] == (0, 0)
    assert found.layouts["zero0"].largest["video"] == (0, 0)
    assert found.layouts["zero3"].largest["video"][1] > 0
    assert "(too much)" in as_text(tables(found))


def test_time_follows_from_the_data_sheet() -> None:
    found = plan("vitg16/pretrain-256px-16f.yaml", gpus=64)
    timing = found.layouts["zero2"].timing
    assert timing is not None
    assert timing.compute == pytest.approx((found.flops - found.recompute) / (0.5 * 989e12))
    # One micro-batch of clips and one of images: gradients all-reduced twice, weights and target
    # gathered once.
    trained = found.numbers.encoder_parameters + found.numbers.predictor_parameters
    sent = (5 * 2 * trained + 2 * found.numbers.encoder_parameters) * 63 / 64
    assert timing.communication == pytest.approx(sent / 50e9)
    assert timing.exposed == pytest.approx(timing.compute + timing.communication + timing.update)
    assert timing.hidden == pytest.approx(max(timing.compute, timing.communication) + timing.update)
    assert found.samples == 64 * (48 + 72)
    assert found.gpu_hours(timing.hidden) == pytest.approx(300_000 * timing.hidden * 64 / 3600)
    assert found.hardware_share == pytest.approx(found.flops / (timing.compute * 989e12), rel=1e-6)


def test_one_process_in_torch_and_many_gpus_only_with_zero() -> None:
    alone, many = plan("demo.yaml", gpus=1), plan("demo.yaml", gpus=2)
    assert alone.layouts["torch"].timing is not None
    assert alone.layouts["zero1"].traffic.total == alone.layouts["zero1"].gathered == 0
    assert many.layouts["torch"].timing is None
    assert "one process" in as_text(tables(many))


def test_the_recipes_engine_is_marked_and_heard() -> None:
    own = "engine.kind=deepspeed", "engine.zero_stage=2", "engine.dtype=bfloat16"
    usual = plan("demo.yaml", *own)
    assert "ZeRO 2 (recipe)" in as_text(tables(usual))
    assert "torch (recipe)" in as_text(tables(plan("demo.yaml")))
    wide = plan("demo.yaml", *own, "engine.communication_dtype=float32")
    traffic, wider = (found.layouts["zero2"].traffic for found in (usual, wide))
    assert (wider.gradients, wider.weights) == (2 * traffic.gradients, traffic.weights)
    moved = plan("demo.yaml", *own, "engine.offload=true")
    states, on_gpu = (found.layouts["zero2"].states for found in (usual, moved))
    assert on_gpu.host == states.master + states.moments + states.ema
    assert "on the host" in as_text(tables(moved))


def test_links_and_utilisation_are_options() -> None:
    recipe = load_recipe(CONFIGS / "demo.yaml")
    resolved = resolve(recipe)
    node = Cluster(gpus=4, gpu=GPUS["h100"])
    assert node.link == 450e9
    assert replace(node, nvlink=100e9).link == 100e9
    assert replace(node, gpus_per_node=2).link == 50e9
    assert replace(node, gpus_per_node=2, network=12e9).link == 12e9

    def products(cluster: Cluster) -> float:
        timing = make_plan(recipe, resolved, cluster).layouts["zero1"].timing
        assert timing is not None
        return timing.compute

    assert products(replace(node, mfu=0.25)) == pytest.approx(2 * products(node))


@pytest.mark.parametrize(
    ("option", "values"),
    [("gpus", {"gpus": 0}), ("mfu", {"mfu": 1.5}), ("mfu", {"mfu": 0.0}),
     ("reserve", {"reserve": 1.0}), ("nvlink", {"nvlink": 0.0}),
     ("gpus-per-node", {"gpus_per_node": 0}), ("network", {"network": -1.0})],
)  # fmt: skip
def test_a_cluster_that_cannot_be_is_refused(option: str, values: dict[str, float]) -> None:
    known: dict[str, object] = {"gpus": 8, "gpu": GPUS["h100"], **values}
    with pytest.raises(ValueError, match=f"^--{option}: "):
        Cluster(**known)  # type: ignore[arg-type]


def test_a_utilisation_beyond_the_peak_is_refused() -> None:
    recipe = load_recipe(CONFIGS / "vitl16/pretrain-256px-16f.yaml")
    cluster = Cluster(gpus=8, gpu=GPUS["h100"], mfu=0.95)
    with pytest.raises(ValueError, match=r"--mfu: 0.95 .* expected at most 0.8"):
        make_plan(recipe, resolve(recipe), cluster)


def counted(stream: Stream) -> float:
    """PyTorch's own count of a batch's products, forward and backward, mean over the steps that the
    plan draws."""
    recipe = load_recipe(CONFIGS / "demo.yaml", SMALL)
    resolved = resolve(recipe)
    with torch.device("meta"):
        jepa = build_jepa(recipe, resolved, torch.device("meta"))
        clip = torch.empty(stream.clips, 3, stream.frames, stream.crop, stream.crop)
    maker = replace(mask_maker(recipe, stream), weigh=False)
    with FlopCounterMode(display=False) as counter:
        for step in range(DRAWN_STEPS):
            masks = maker(step).to(torch.device("meta"))
            with torch.no_grad():
                jepa.target(clip)
            predictions = jepa.predictor.predict(
                jepa.encoder(clip, masks.context), masks.context, masks.predict,
                jepa.encoder.grid(clip), image=stream.frames == 1,
            )  # fmt: skip
            sum(rows.sum() for rows in predictions).backward()  # type: ignore[union-attr]
    return counter.get_total_flops() / DRAWN_STEPS


def test_balanced_ranks_do_the_same_work_as_pytorch_counts_it() -> None:
    found = plan("demo.yaml", *SMALL, *EVEN, gpus=16)
    assert found.roles is not None
    released, even = found.roles
    assert released.spread > 0.5
    assert even.spread <= 0.05
    assert even.image.share == even.video.share == 0.5
    streams = resolve(load_recipe(CONFIGS / "demo.yaml", SMALL)).streams
    work = [
        counted(replace(streams[name], clips=role.batch))
        for name, role in (("image", even.image), ("video", even.video))
    ]
    assert max(work) / min(work) <= 1.05
    assert found.flops == pytest.approx(max(even.work))
    as_given = plan("demo.yaml", *SMALL, "ranks.rank_ratio=0.5", gpus=16)
    assert as_given.flops == pytest.approx(max(released.work))
    assert as_given.roles == found.roles


def test_planned_operations_are_those_that_pytorch_counts() -> None:
    found = plan("demo.yaml", *SMALL)
    for name, stream in resolve(load_recipe(CONFIGS / "demo.yaml", SMALL)).streams.items():
        flops = found.numbers.parts[name].flops
        assert flops.total - flops.loss.total == pytest.approx(counted(stream), rel=1e-6)


def test_a_split_that_cannot_be_even_is_planned_as_it_is_and_refused_if_asked_for() -> None:
    uneven = (
        *SMALL, "data.image_batch=1", "data.batch=1", "data.crop=64", "data.frames=2",
        "data.image_crop=96", "ranks.rank_ratio=0.5",
    )  # fmt: skip
    found = plan("demo.yaml", *uneven, gpus=2)
    assert found.roles is not None
    assert [roles.spread > 0.05 for roles in found.roles] == [True]
    with pytest.raises(ValueError, match=r"ranks\.balance: no split of 2 ranks"):
        plan("demo.yaml", *uneven, "ranks.balance=work", gpus=2)


def test_clips_of_several_lengths_are_planned_on_video_ranks() -> None:
    """Where ranks are split by ratio, as in training; work is not evened out over lengths."""
    lengths = "data.lengths=[{frames: 16, batch: 2, share: 0.5}]"
    own = (*SMALL, "ranks.rank_ratio=0.5", "data.mix=alternate")
    both, one = plan("demo.yaml", *own, lengths), plan("demo.yaml", *own)
    assert both.roles is None
    assert both.flops > one.flops  # the busiest rank takes longer clips half of the time
    names = set(next(iter(both.layouts.values())).largest)
    assert {"video", "image"} < names
    with pytest.raises(ValueError, match=r"ranks\.balance: work is counted for .*, or ratio"):
        plan("demo.yaml", *own, "ranks.balance=work", lengths)


def test_roles_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"ranks\.rank_ratio: 0\.5 splits .* data\.image is empty"):
        plan("demo.yaml", "data.image=[]", "ranks.rank_ratio=0.5")
    with pytest.raises(ValueError, match="both need one"):
        plan("demo.yaml", "ranks.rank_ratio=0.2", gpus=4)


def test_a_terminal_shows_what_a_pipe_gets_and_json_has_the_numbers() -> None:
    found = plan("demo.yaml", *SMALL, *EVEN, gpus=16)
    console = Console(width=400, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(as_table(tables(found)))
    shown = console.export_text()
    lines = as_text(tables(found)).splitlines()
    for grid in tables(found):
        assert grid.title in shown
        assert grid.title in lines
        assert all(cell in shown for row in grid.rows for cell in row)
    tree = json.loads(as_json(found))
    layout, kept = found.layouts["zero2"], tree["layouts"]["zero2"]
    assert kept["states"]["master"] == layout.states.master
    assert kept["bytes"]["checkpointed"] == layout.total(checkpointing=True)
    assert layout.timing is not None
    assert kept["timing"]["hidden"]["step"] == layout.timing.hidden
    assert tree["roles"][1]["image"]["share"] == 0.5


def test_a_plan_with_the_encoder_checkpointed_lies_between() -> None:
    every, found = (
        plan("demo.yaml", f"model.checkpointing={blocks}") for blocks in ("true", "encoder")
    )
    assert 0 < found.recompute < every.recompute
    assert any("encoder checkpointed" in line for line in as_text(tables(found)).splitlines())
    for name, layout in found.layouts.items():
        plain, again = (
            layout.total(checkpointing=checkpointing) for checkpointing in (False, True)
        )
        assert every.layouts[name].total(checkpointing=True) < again < plain
        assert plain == every.layouts[name].total(checkpointing=False)


def test_the_command_prints_a_plan_and_answers_a_mistake_in_a_line() -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fastjepa.cli", "plan", "configs/demo.yaml", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)

    good = run("--gpus", "16", "--gpu", "b200", "--json")
    assert good.returncode == 0
    assert json.loads(good.stdout)["cluster"]["gpu"]["name"] == GPUS["b200"].name
    bad = run("--gpu", "k80")
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: --gpu: expected one of a100")
    assert len(bad.stderr.splitlines()) == 1
