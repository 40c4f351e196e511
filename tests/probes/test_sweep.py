"""Heads side by side: each as if it were alone; a killed sweep goes on to the same bits."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastjepa.checkpoint.tensor_file import CheckpointError
from fastjepa.probes.sweep import Samples, Setting, Sweep, grid

X = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
Y = X @ torch.tensor([1.0, -2.0, 3.0, 0.5])
SAMPLES = Samples(len(X), lambda index: (X[index], Y[index]))


def squared(head: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (head(x)[:, 0] - y).square().mean()


def sweep(settings: list[Setting], epochs: int = 6) -> Sweep[tuple[Tensor, Tensor]]:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))

    return Sweep(make, settings, squared, epochs=epochs, batch=16, warmup=0.2)


def weights(of: nn.Module) -> list[Tensor]:
    return [x.clone() for x in of.state_dict().values()]


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(map(torch.equal, weights(a), weights(b)))


def test_the_grid_has_every_pair() -> None:
    assert grid((1.0, 2.0), (0.1, 0.2)) == [(1.0, 0.1), (1.0, 0.2), (2.0, 0.1), (2.0, 0.2)]


def test_a_head_does_not_feel_its_neighbours() -> None:
    settings = [Setting(1e-3, 0.0), Setting(3e-2, 0.1)]
    both = sweep(settings)
    assert equal(both.heads[0], both.heads[1])
    both.train(SAMPLES)
    for number, setting in enumerate(settings):
        alone = sweep([setting])
        alone.train(SAMPLES)
        assert equal(both.heads[number], alone.heads[0])
    best, scores = both.best(lambda head: -squared(head, (X, Y)).item())
    assert best == 1
    assert scores[1] > scores[0]


def test_making_heads_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    sweep([Setting(1e-3, 0.0)])
    assert torch.equal(torch.rand(3), expected)


class KilledError(RuntimeError):
    pass


@pytest.mark.parametrize("after", [0, 3, 5])
def test_it_goes_on_after_a_kill_to_the_same_bits(after: int, tmp_path: Path) -> None:
    settings = grid((1e-3, 1e-2), (0.0, 0.1))
    whole = sweep(settings)
    whole.train(SAMPLES)

    def kill(epoch: int, losses: list[float]) -> None:
        assert len(losses) == len(settings)
        if epoch == after:
            raise KilledError

    file = tmp_path / "heads.safetensors"
    with pytest.raises(KilledError):
        sweep(settings).train(SAMPLES, file=file, say=kill)
    again, seen = sweep(settings), []
    again.train(SAMPLES, file=file, say=lambda epoch, losses: seen.append(epoch))
    assert seen == list(range(after + 1, 6))
    assert equal(again.heads, whole.heads)


def test_heads_of_another_sweep_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "heads.safetensors"
    sweep([Setting(1e-3, 0.0)]).train(SAMPLES, file=file)
    with pytest.raises(CheckpointError, match=r"epochs 6 where this one has 7"):
        sweep([Setting(1e-3, 0.0)], epochs=7).train(SAMPLES, file=file)
    with pytest.raises(CheckpointError, match=r"settings 0.001 x 0 where this one has 0.1 x 0"):
        sweep([Setting(0.1, 0.0)]).train(SAMPLES, file=file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        sweep([Setting(1e-3, 0.0)]).train(SAMPLES, file=file)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got 0, 6, 16 and 0\.2"):
        sweep([])
