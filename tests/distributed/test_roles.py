"""Image ranks and video ranks by the real command, against one process with all their clips."""

import importlib.util
from pathlib import Path

import pytest
import torch

from fastjepa.build import build_jepa, plan_of
from fastjepa.build_data import datasets_of, loaders_of
from fastjepa.checkpoint import latest_checkpoint, load_checkpoint
from fastjepa.config.load import load_recipe
from fastjepa.config.resolve import resolve
from fastjepa.config.schema import Recipe
from fastjepa.data.augment import normalise
from fastjepa.roles import RankShare, share_of
from fastjepa.train.engine import TorchEngine
from fastjepa.train.guard import LossGuard
from fastjepa.train.step import MicroBatch, train_step

from ..processes import finish
from .conftest import recipe, rows, train

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

CPU = torch.device("cpu")
# The same clips, masks and weights: what is left is the order in which sums are taken.
TOLERANCE = 1e-5
RATIO = ("ranks.rank_ratio=0.5", "data.image_crop=48", "objective.context_weight.image=0.3",
         "objective.ramp=null", "data.image_batch=3", "observe.pictures=false")  # fmt: skip
WORK = ("ranks.balance=work",)


def shares(chosen: Recipe, ranks: int) -> list[RankShare]:
    resolved = resolve(chosen)
    return [share_of(chosen, resolved, rank=rank, ranks=ranks) for rank in range(ranks)]


def mixture(chosen: Recipe, ranks: int) -> tuple[list[float], list[float], TorchEngine]:
    """Losses, gradient norms and the engine of one process that takes every rank's micro-batches,
    the mean over the ranks."""
    resolved = resolve(chosen)
    torch.manual_seed(chosen.run.seed)
    jepa = build_jepa(chosen, resolved, CPU)
    engine = TorchEngine(
        encoder=jepa.encoder, predictor=jepa.predictor, target=jepa.target,
        weight_decay=chosen.optim.weight_decay, betas=chosen.optim.betas, eps=chosen.optim.eps,
    )  # fmt: skip
    guard = LossGuard(sigma=None, window=4, start=0, device=CPU)
    parts = shares(chosen, ranks)
    plans = [plan_of(chosen, resolved, share) for share in parts]
    datasets = datasets_of(chosen, resolved)
    loaders = [loaders_of(chosen, share, datasets, CPU) for share in parts]
    batches = [
        {
            name: loader.batches(0, plan.position(resolved.steps, name))
            for name, loader in own.items()
        }
        for own, plan in zip(loaders, plans, strict=True)
    ]
    losses, norms = [], []
    for step in range(resolved.steps):
        taken = [
            MicroBatch(
                normalise((batch := next(own[draw.stream])).clip), batch.extras, draw.share / ranks,  # type: ignore[arg-type]
                plan.context_weight(step, draw.stream),
            )
            for own, plan in zip(batches, plans, strict=True)
            for draw in plan.draws(step)
        ]  # fmt: skip
        report = train_step(
            jepa, engine, guard, taken, step=step, lr=plans[0].lr(step),
            weight_decay=plans[0].decay(step), momentum=plans[0].momentum(step),
        )  # fmt: skip
        losses.append(float(report.loss))
        norms.append(float(report.grad_norm))
    return losses, norms, engine


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (2, (*RATIO, "engine.zero_stage=3")),
        (2, (*RATIO, *WORK, "engine.zero_stage=2", "optim.accumulate=2")),
        pytest.param(4, (*RATIO, "engine.zero_stage=2"), marks=pytest.mark.slow),
    ],
    ids=["2 ranks", "2 ranks of equal work", "4 ranks"],
)
def test_ranks_take_the_gradient_of_the_mixture(
    tmp_path: Path, ranks: int, overrides: tuple[str, ...]
) -> None:
    folder = tmp_path / "run"
    path = recipe(folder, steps=4)
    code, out = finish(train(path, *overrides, nproc=ranks))
    assert code == 0, out
    found = rows(folder)
    chosen = load_recipe(path, list(overrides))
    losses, norms, engine = mixture(chosen, ranks)
    assert [row["loss"] for row in found] == pytest.approx(losses, rel=TOLERANCE)
    assert [row["grad_norm"] for row in found] == pytest.approx(norms, rel=TOLERANCE)
    newest = latest_checkpoint(folder)
    assert newest is not None
    saved = load_checkpoint(newest).tensors
    for part, network in engine.networks.items():
        for name, tensor in network.state_dict().items():
            torch.testing.assert_close(saved[part][name], tensor, rtol=0, atol=TOLERANCE)
    row = found[-1]
    # Weights differ by TOLERANCE, and the distance is of their small differences.
    assert row["ema_distance"] == pytest.approx(float(engine.ema_distance()), rel=1e-2)
    assert row["image_share"] == pytest.approx(0.5)
    assert row["context_weight"] == pytest.approx(0.4)
    assert row["loss"] == pytest.approx((row["loss/image"] + row["loss/video"]) / 2, rel=TOLERANCE)
    assert {"mfu", "flops_per_second", "ema_distance", "slowest_rank"} <= row.keys()
    spreads = [row["work_spread"] for row in found]
    if "ranks.balance=work" in overrides:
        # Even on average: on so small a grid a step's masks differ by more.
        assert max(spreads) < 0.5
    else:
        assert min(spreads) > 1.0


def test_ranks_between_them_read_what_one_would(tmp_path: Path) -> None:
    """A modality's batches, rank by rank, are the stretches of one sequence of samples."""
    chosen = load_recipe(recipe(tmp_path / "run"), [*RATIO])
    datasets = datasets_of(chosen, resolve(chosen))

    def read(ranks: int, batches: int) -> dict[str, torch.Tensor]:
        found: dict[str, list[torch.Tensor]] = {"video": [], "image": []}
        for share in shares(chosen, ranks):
            for name, loader in loaders_of(chosen, share, datasets, CPU).items():
                found[name] += [batch.clip for batch in loader.batches(0, batches)]
        # By rank and step, to by step and rank.
        order = {
            name: [clips[rank * batches + step] for step in range(batches) for rank in range(
                len(clips) // batches)]
            for name, clips in found.items()
        }  # fmt: skip
        return {name: torch.cat(clips) for name, clips in order.items()}

    two, four, one = read(2, batches=2), read(4, batches=1), read(1, batches=2)
    for name, clips in one.items():
        assert torch.equal(two[name], clips)
        assert torch.equal(four[name], clips)


@pytest.mark.parametrize("steps", [2, 6])
def test_another_number_of_ranks_goes_on_at_the_place_of_each_modality(
    tmp_path: Path, steps: int
) -> None:
    path = recipe(tmp_path / "run")

    def samples(ranks: int) -> dict[str, int]:
        chosen = load_recipe(path, [*RATIO, f"optim.accumulate={4 // ranks}"])
        resolved = resolve(chosen)
        return {
            name: plan_of(chosen, resolved, share).position(steps, name) * share.ranks * one.clips
            for share in shares(chosen, ranks)
            for name, one in share.streams.items()
        }

    assert samples(4) == samples(2) == samples(1)
