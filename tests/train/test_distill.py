"""Distillation: a frozen, larger teacher gives the targets; the student's average is kept."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastjepa
from fastjepa.build import build
from fastjepa.checkpoint import latest_checkpoint, load_checkpoint, write_encoder
from fastjepa.config.load import load_recipe
from fastjepa.config.resolve import resolve
from fastjepa.convert import convert
from fastjepa.estimate import estimate
from fastjepa.model import Encoder
from fastjepa.observe.sinks import read_metrics
from fastjepa.train.loop import Trainer
from fastjepa.train.signals import StopRequest

from ..processes import finish
from .conftest import start

Write = Callable[..., Path]
SIZES = {"width": 64, "depth": 6, "heads": 4, "mlp_width": 96}


def teacher(path: Path, moved: float = 0.0) -> Path:
    """A wider and deeper encoder than the recipe's, as `fastjepa export` writes it."""
    torch.manual_seed(0)
    encoder = Encoder(**SIZES, levels=(1, 3, 5))
    with torch.no_grad():
        encoder.blocks[0].norm1.weight += moved  # type: ignore[operator, union-attr]
    rest = {"patch": 16, "tubelet": 2, "interpolate_rope": True, "rope": "interleaved"}
    sizes = {**SIZES, "levels": (1, 3, 5), **rest, "generation": "2.1"}
    write_encoder(path, encoder.state_dict(), sizes)  # type: ignore[arg-type]
    return path


def overrides(path: Path, steps: int = 4) -> list[str]:
    distill = ", ".join(f"{key}: {value}" for key, value in SIZES.items())
    return [
        f"distill={{teacher: {path}, name: vit_tiny, {distill}}}",
        "objective.deep=false", "objective.ramp=null", f"train.steps={steps}",
    ]  # fmt: skip


def trained(recipe: Path, *changes: str) -> Trainer:
    trainer = build(load_recipe(recipe, changes))
    assert trainer.run(StopRequest())
    return trainer


def parts(folder: Path) -> dict[str, dict[str, Tensor]]:
    path = latest_checkpoint(folder)
    assert path is not None
    return load_checkpoint(path).tensors


def test_the_teacher_stays_and_the_average_of_the_student_is_kept(
    write_recipe: Write, tmp_path: Path
) -> None:
    file = teacher(tmp_path / "teacher.safetensors")
    recipe, before = write_recipe("run"), fastjepa.load(file)
    trainer = trained(recipe, *overrides(file))
    source = trainer.jepa.teacher
    assert source is trainer.jepa.source
    assert source is not None
    for name, tensor in before.state_dict().items():
        assert torch.equal(source.state_dict()[name], tensor), name
    saved = parts(tmp_path / "run")
    assert saved["predictor"]["predictor_proj.weight"].shape[0] == SIZES["width"]
    norms = [f"norms_block.{i}.weight" for i in range(3)]
    assert all(torch.equal(saved["encoder"][n], torch.ones(48)) for n in norms)  # not supervised
    moved = [
        n for n, t in saved["encoder"].items() if not torch.equal(t, saved["target_encoder"][n])
    ]
    assert moved
    kept = fastjepa.load(tmp_path / "run")
    assert kept.width == 48
    assert torch.equal(
        kept.patch_embed.proj.weight, saved["target_encoder"]["patch_embed.proj.weight"]
    )


def test_it_is_exported_as_the_released_students_are(write_recipe: Write, tmp_path: Path) -> None:
    file = teacher(tmp_path / "teacher.safetensors")
    trained(write_recipe("run"), *overrides(file, steps=2))
    convert(tmp_path / "run", "official", tmp_path / "student.pt")
    official = torch.load(tmp_path / "student.pt", weights_only=True)
    assert {"ema_encoder", "encoder", "predictor"} <= official.keys()
    assert "target_encoder" not in official
    loaded, kept = fastjepa.load(tmp_path / "student.pt"), fastjepa.load(tmp_path / "run")
    assert "ema_encoder" in loaded.origin
    for name, tensor in kept.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_its_log_has_the_teachers_level_and_no_drift(write_recipe: Write, tmp_path: Path) -> None:
    file = teacher(tmp_path / "teacher.safetensors")
    trained(write_recipe("run"), *overrides(file, steps=2))
    first, last = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert "target_drift" not in last
    assert last["target_std/level5"] == first["target_std/level5"] > 0.0
    assert last["target_norm/level5"] == first["target_norm/level5"] > 0.0
    assert {key for key in last if key.startswith("loss_predict/")} == {"loss_predict/level3"}


def test_a_cut_run_equals_a_straight_one_and_knows_its_teacher(
    write_recipe: Write, tmp_path: Path
) -> None:
    file = teacher(tmp_path / "teacher.safetensors")
    straight, cut = write_recipe("straight"), write_recipe("cut")
    trained(straight, *overrides(file, steps=4))
    trained(cut, *overrides(file, steps=2))
    trained(cut, *overrides(file, steps=4))
    wanted, found = parts(tmp_path / "straight"), parts(tmp_path / "cut")
    for part in ("encoder", "predictor", "target_encoder", "optimizer"):
        tensors = wanted[part]
        assert all(torch.equal(found[part][name], tensor) for name, tensor in tensors.items()), part
    teacher(file, moved=0.01)
    with pytest.raises(ValueError, match="another teacher"):
        build(load_recipe(cut, overrides(file, steps=6)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("distill.width=128", "distill.width 128"),
        ("distill.depth=5", "distill.depth 5"),
        ("objective.deep=true", "objective.deep"),
        ("distill.teacher=no/such/run", "no/such/run"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_in_one_line(
    write_recipe: Write, tmp_path: Path, change: str, said: str
) -> None:
    file = teacher(tmp_path / "teacher.safetensors")
    with pytest.raises(ValueError, match=said) as error:
        build(load_recipe(write_recipe("run"), [*overrides(file), change]))
    assert "\n" not in str(error.value)


def test_costs_count_the_teacher(write_recipe: Write, tmp_path: Path) -> None:
    file = teacher(tmp_path / "teacher.safetensors")
    recipe = load_recipe(write_recipe("run"), overrides(file))
    numbers = estimate(recipe, resolve(recipe))
    levels = torch.nn.LayerNorm(SIZES["width"])  # the estimate has four, as released files do
    count = sum(p.numel() for p in fastjepa.load(file).parameters())
    assert numbers.teacher_parameters == count + sum(p.numel() for p in levels.parameters())
    assert numbers.memory.states.teacher == 4 * numbers.teacher_parameters
    plain = load_recipe(write_recipe("plain"), ["objective.deep=false", "objective.ramp=null"])
    without = estimate(plain, resolve(plain))
    assert numbers.parts["video"].flops.target.forward > without.parts["video"].flops.target.forward
    assert numbers.predictor_parameters > without.predictor_parameters


def test_deepspeed_distils_as_one_process_does(write_recipe: Write, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    changes = overrides(teacher(tmp_path / "teacher.safetensors"), steps=3)
    trained(write_recipe("one"), *changes)
    code, out = finish(start(write_recipe("sharded"), *changes, "engine.kind=deepspeed"))
    assert code == 0, out
    one, sharded = (read_metrics(tmp_path / n / "metrics.jsonl") for n in ("one", "sharded"))
    assert [row["loss"] for row in sharded] == pytest.approx([r["loss"] for r in one], rel=1e-4)
