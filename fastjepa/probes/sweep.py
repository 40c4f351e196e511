"""Heads of one kind trained side by side on the same batches, one for each learning rate and weight
decay.

The batches of an epoch follow from the seed and its number, so a run that was killed goes on from
its last finished epoch to the same weights, bit for bit.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastjepa.checkpoint.optimizer_state import pack_optimizer, unpack_optimizer
from fastjepa.checkpoint.strict import load_strict
from fastjepa.checkpoint.tensor_file import CheckpointError, read_tensors, write_tensors
from fastjepa.durable import whole_file

T = TypeVar("T")


class Setting(NamedTuple):
    """Peak learning rate and weight decay of one head."""

    lr: float
    weight_decay: float


def grid(lrs: Sequence[float], weight_decays: Sequence[float]) -> list[Setting]:
    """Every pair of the two."""
    return [Setting(lr, decay) for lr, decay in product(lrs, weight_decays)]


@dataclass(frozen=True)
class Samples(Generic[T]):
    """`size` labelled samples; `fetch(index)` gives those of an int64 [B] index, as heads take
    them."""

    size: int
    fetch: Callable[[Tensor], T]


class Sweep(Generic[T]):
    """Heads that start alike, trained by AdamW: linear warm-up, then a cosine to 0.

    `make` builds one head; `loss(head, batch)` is a scalar. `steps` of a run are `epochs` times the
    batches of the samples. `say` is called after every epoch with its number and each head's mean
    loss.
    """

    def __init__(
        self,
        make: Callable[[], nn.Module],
        settings: Sequence[Setting],
        loss: Callable[[nn.Module, T], Tensor],
        *,
        epochs: int,
        batch: int,
        warmup: float = 0.0,
        seed: int = 0,
    ) -> None:
        if not settings or epochs < 1 or batch < 1 or not 0.0 <= warmup < 1.0:
            raise ValueError(
                "sweep: expected some settings, epochs and batch >= 1 and a warm-up of 0 to below "
                f"1, got {len(settings)}, {epochs}, {batch} and {warmup}"
            )
        self.settings, self._loss, self._seed = tuple(settings), loss, seed
        self._epochs, self._batch, self._warmup = epochs, batch, warmup
        with torch.random.fork_rng():
            heads = []
            for _ in settings:
                torch.manual_seed(seed)
                heads.append(make())
        self.heads = nn.ModuleList(heads)
        self._optimizer = torch.optim.AdamW(
            [
                {"params": list(head.parameters()), "lr": 0.0, "weight_decay": one.weight_decay}
                for head, one in zip(heads, settings, strict=True)
            ]
        )

    def train(
        self,
        samples: Samples[T],
        *,
        file: Path | None = None,
        say: Callable[[int, list[float]], None] = lambda epoch, losses: None,
    ) -> None:
        """Train for all epochs; with `file`, from the epoch that is saved there, saving each one.

        Raises CheckpointError when `file` is damaged or of another sweep.
        """
        steps = self._epochs * math.ceil(samples.size / self._batch)
        step = 0
        first = 0 if file is None or not file.exists() else self._resume(file, samples.size)
        self.heads.train()
        for epoch in range(self._epochs):
            order = torch.Generator().manual_seed(self._seed * 100_003 + epoch)
            batches = torch.randperm(samples.size, generator=order).split(self._batch)
            if epoch < first:
                step += len(batches)
                continue
            total = torch.zeros(len(self.heads))
            for index in batches:
                self._set_rates(self._factor(step, steps))
                data = samples.fetch(index)
                for number, head in enumerate(self.heads):
                    loss = self._loss(head, data)
                    loss.backward()
                    total[number] += loss.detach().cpu()
                self._optimizer.step()
                self._optimizer.zero_grad(set_to_none=True)
                step += 1
            if file is not None:
                self._save(file, epoch + 1, samples.size)
            say(epoch, (total / len(batches)).tolist())
        self.heads.eval()

    def best(self, score: Callable[[nn.Module], float]) -> tuple[int, list[float]]:
        """The number of the head of highest `score` (the first of equals), and all scores."""
        with torch.inference_mode():
            scores = [score(head) for head in self.heads]
        return max(range(len(scores)), key=lambda number: scores[number]), scores

    def _factor(self, step: int, steps: int) -> float:
        ramp = round(self._warmup * steps)
        if step < ramp:
            return (step + 1) / (ramp + 1)
        return 0.5 * (1.0 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))

    def _set_rates(self, factor: float) -> None:
        for group, setting in zip(self._optimizer.param_groups, self.settings, strict=True):
            group["lr"] = setting.lr * factor

    def _facts(self, size: int) -> dict[str, str]:
        pairs = ", ".join(f"{lr:g} x {decay:g}" for lr, decay in self.settings)
        return {
            "settings": pairs, "samples": str(size), "epochs": str(self._epochs),
            "batch": str(self._batch), "warmup": f"{self._warmup:g}", "seed": str(self._seed),
        }  # fmt: skip

    def _save(self, file: Path, epoch: int, size: int) -> None:
        tensors = {f"heads.{name}": x for name, x in self.heads.state_dict().items()}
        named = pack_optimizer(self._optimizer, self.heads.named_parameters())
        tensors |= {f"optimizer.{name}": x for name, x in named.items()}
        about = {"epoch": str(epoch), **self._facts(size)}
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as temporary:
            write_tensors(temporary, tensors, about)

    def _resume(self, file: Path, size: int) -> int:
        """Take over a saved epoch; returns how many are done."""
        tensors, about = read_tensors(file)
        other = [
            f"{key} {about.get(key)} where this one has {value}"
            for key, value in self._facts(size).items()
            if about.get(key) != value
        ]
        if other:
            raise CheckpointError(f"{file}: heads of another probe: {'; '.join(other)}")

        def part(name: str) -> dict[str, Tensor]:
            front = f"{name}."
            return {k.removeprefix(front): x for k, x in tensors.items() if k.startswith(front)}

        load_strict(self.heads, part("heads"), str(file))
        named = self.heads.named_parameters()
        unpack_optimizer(self._optimizer, named, part("optimizer"), str(file))
        return int(about["epoch"])
