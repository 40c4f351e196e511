"""Data on which the training diverges is left out: back to the last good checkpoint, and on."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fastjepa.build import build
from fastjepa.checkpoint import load_checkpoint
from fastjepa.config.load import load_recipe
from fastjepa.data.augment import normalise
from fastjepa.data.batch import Batch, BatchSource
from fastjepa.observe.sinks import read_metrics
from fastjepa.train.loop import RunStoppedError, Trainer
from fastjepa.train.returns import Returns
from fastjepa.train.signals import StopRequest

Write = Callable[..., Path]
SETTINGS = ["train.checkpoint_every=4", "train.steps=12", "data.image=[]", "guard.return_after=2"]


class Spoilt:
    """A source in which the batches of some steps hold an infinity."""

    def __init__(self, source: BatchSource, steps: range) -> None:
        self.source, self.steps = source, steps

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        for batch in self.source.batches(start, stop):
            clip = normalise(batch.clip)
            if batch.step in self.steps:
                clip[0, 0, 0, 0, 0] = torch.inf
            yield batch._replace(clip=clip)

    def first_clip(self) -> Batch:
        return self.source.first_clip()

    def close(self) -> None:
        self.source.close()


class WithoutSome:
    """A source that never had the batches of some steps."""

    def __init__(self, source: BatchSource, steps: range) -> None:
        self.source, self.steps = source, steps

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        assert start == 0
        found = self.source.batches(0, stop + len(self.steps))
        return (batch for batch in found if batch.step not in self.steps)

    def first_clip(self) -> Batch:
        return self.source.first_clip()

    def close(self) -> None:
        self.source.close()


def trainer(recipe: Path, spoilt: range, *overrides: str) -> Trainer:
    made = build(load_recipe(recipe, [*SETTINGS, *overrides]))
    made.loaders = {name: Spoilt(loader, spoilt) for name, loader in made.loaders.items()}
    return made


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    tensors = load_checkpoint(folder / "checkpoints" / f"step-{step:08}").tensors
    return {
        f"{part}/{name}": tensor
        for part in ("encoder", "predictor", "target_encoder", "optimizer")
        for name, tensor in tensors[part].items()
    }


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        torch.equal(found[name], tensor) for name, tensor in wanted.items()
    )


def test_a_run_goes_back_and_ends_as_if_the_data_had_not_been_there(
    write_recipe: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps 5 and 6 are skipped; step 4's checkpoint is the last before them."""
    recipe = write_recipe("run")
    assert trainer(recipe, range(5, 7)).run(StopRequest())
    assert "step 7: 2 steps in a row were skipped; back to step 4" in capsys.readouterr().out
    folder = recipe.with_suffix("")
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["returns"] for row in rows] == [0] * 4 + [1] * 8
    assert {row["steps_left_out"] for row in rows[4:]} == {3}
    assert {row["skipped"] for row in rows} == {0}
    checkpoint = load_checkpoint(folder / "checkpoints" / "latest")
    assert checkpoint.state["returns"] == [{"at": 7, "to": 4}]

    plain = write_recipe("plain")
    never = build(load_recipe(plain, SETTINGS))
    never.loaders = {name: WithoutSome(one, range(4, 7)) for name, one in never.loaders.items()}
    assert never.run(StopRequest())
    assert same(weights(folder, 12), weights(plain.with_suffix(""), 12))


def test_a_restart_takes_the_data_of_a_run_that_was_never_stopped(write_recipe: Write) -> None:
    straight, cut = write_recipe("straight"), write_recipe("cut")
    assert trainer(straight, range(5, 7)).run(StopRequest())
    asked = StopRequest()
    first = trainer(cut, range(5, 7))
    console, update = first.console, first.console.update

    def stop_after_the_return(metrics: dict[str, float]) -> None:
        update(metrics)
        if metrics.get("returns") == 1:
            asked.name = "SIGTERM"

    console.update = stop_after_the_return  # type: ignore[method-assign, assignment]
    assert not first.run(asked)
    assert first.step < 12
    assert trainer(cut, range(5, 7)).run(StopRequest())
    assert same(weights(cut.with_suffix(""), 12), weights(straight.with_suffix(""), 12))


def test_returns_are_bounded_and_then_the_run_stops(write_recipe: Write) -> None:
    """Everything from step 5 on is bad: two returns, then skipped steps end the run."""
    recipe = write_recipe("run")
    made = trainer(recipe, range(5, 100), "guard.max_returns=2", "guard.max_skips=3")
    with pytest.raises(RunStoppedError, match="4 steps in a row were skipped"):
        made.run(StopRequest())
    assert [(one["at"], one["to"]) for one in made.returns.made] == [(7, 4), (6, 4)]


def test_without_a_checkpoint_to_go_back_to_the_run_goes_on(write_recipe: Write) -> None:
    made = trainer(write_recipe("run"), range(1, 3))
    assert made.run(StopRequest())
    assert made.returns.made == []
    assert int(made.guard.skipped) == 2


def test_a_return_that_can_never_come_is_refused(write_recipe: Write) -> None:
    with pytest.raises(ValueError, match=r"guard.*return_after: 20 never comes"):
        load_recipe(write_recipe("run"), ["guard.return_after=20"])


def test_data_moves_on_by_what_was_left_out() -> None:
    returns = Returns(after=2, most=3)
    assert returns.data_step(9) == 9
    returns.note(at=20, to=12)
    returns.note(at=15, to=12)
    assert returns.data_step(12) == 12 + 8 + 3
    again = Returns(after=2, most=3)
    again.load(returns.state())
    assert again.data_step(30) == returns.data_step(30)
    assert not Returns(after=None, most=3).asked_for(100)
    assert returns.asked_for(2)
    assert not returns.asked_for(1)
