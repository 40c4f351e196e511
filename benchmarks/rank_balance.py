"""Work and time of image ranks and video ranks, as in the official code and with equal work.

    python benchmarks/rank_balance.py --json rank_balance.json

For each split every kind of rank's forward and backward runs in this process, the kinds in turn, on
the masks of its own loader: seconds are medians, operations the model's (tests compare them with
PyTorch's counter). In a run the ranks with less to do wait for the others.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from fastjepa.bench.machine import device_facts
from fastjepa.bench.traffic import Traffic
from fastjepa.build import build_jepa
from fastjepa.config.load import load_recipe
from fastjepa.config.resolve import resolve
from fastjepa.recipe_parts import mask_maker, network_numbers
from fastjepa.roles import share_of
from fastjepa.train.engine import TorchEngine
from fastjepa.train.step import MicroBatch, forward_backward
from fastjepa.train.work import Work

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
RANKS, STEPS = 4, 8
# Images cost about a tenth of clips, as in the released recipes.
OVERRIDES = ["ranks.rank_ratio=0.5", "data.frames=16", "data.batch=2", "data.image_batch=4",
             "data.image_share=0.5", "engine.threads=2"]  # fmt: skip


class Kind:
    """The ranks of one modality in one split: their micro-batches, and how long these take."""

    def __init__(self, balance: str, rank: int) -> None:
        recipe = load_recipe(ROOT / "configs/demo.yaml", [*OVERRIDES, f"ranks.balance={balance}"])
        resolved = resolve(recipe)
        self.share = share_of(recipe, resolved, rank=rank, ranks=RANKS)
        ((self.name, self.stream),) = self.share.streams.items()
        self._maker = mask_maker(recipe, self.stream, self.share.rank)
        self._work = Work(*network_numbers(recipe, resolved), peak=None)
        self._jepa = build_jepa(recipe, resolved, CPU)
        self._engine = TorchEngine(
            encoder=self._jepa.encoder, predictor=self._jepa.predictor, target=self._jepa.target
        )
        self._frames = 1 if self.name == "image" else self.stream.frames
        self.seconds: list[float] = []

    def step(self, number: int) -> None:
        crop = self.stream.crop
        clip = torch.randn(self.stream.clips, 3, self._frames, crop, crop)
        batch = MicroBatch(clip, self._maker(number), self.share.weight, 0.5)
        started = time.perf_counter()
        forward_backward(self._jepa, self._engine, [batch])
        self.seconds.append(time.perf_counter() - started)
        self._engine.optimizer.zero_grad()

    def bytes(self) -> int:
        """That the operations of one step read and write."""
        counter = Traffic()
        with counter:
            self.step(0)
        self.seconds.pop()
        return counter.bytes

    def operations(self) -> float:
        """The model's, in a mean step."""
        stream = self.stream
        return statistics.fmean(
            self._work.flops(
                self._maker(number), clips=stream.clips, tokens=stream.tokens,
                image=self.name == "image",
            )
            for number in range(STEPS)
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(2)
    kinds = {
        (balance, name): Kind(balance, rank)
        for balance in ("ratio", "work")
        for name, rank in (("image", 0), ("video", RANKS - 1))
    }
    for number in range(-1, STEPS):
        for kind in kinds.values():
            kind.step(max(number, 0))
    rows: list[dict[str, Any]] = []
    for (balance, name), kind in kinds.items():
        seconds = statistics.median(kind.seconds[1:])
        rows.append(
            {
                "balance": balance, "modality": name, "ranks": kind.share.ranks,
                "batch": kind.stream.clips, "weight": kind.share.weight, "seconds": seconds,
                "seconds_by_step": kind.seconds[1:], "operations": kind.operations(),
                "bytes": kind.bytes(),
            }
        )  # fmt: skip
    for balance in ("ratio", "work"):
        image, video = (row for row in rows if row["balance"] == balance)
        print(
            f"by {balance}: {image['ranks']} image ranks of {image['batch']}, {video['ranks']} "
            f"video ranks of {video['batch']}: an image rank takes "
            f"{image['seconds'] / video['seconds']:.2f} of a video rank's time, "
            f"{image['operations'] / video['operations']:.2f} of its operations, "
            f"{image['bytes'] / video['bytes']:.2f} of its bytes"
        )
    if arguments.json:
        facts = {"torch": torch.__version__, "device": device_facts(CPU), "ranks": rows}
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
