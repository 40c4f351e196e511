"""What a run is worth while it trains: k-NN on labelled clips and a PCA picture of fixed ones.

    evaluation = OnlineEvaluation(500, moving_digits(128, frames=16, fps=4.0, size=256))
    metrics, picture = evaluation(trainer)

Both look at the averaged encoder. Nothing is drawn from a random generator and nothing is taken
from the run's data, so a run goes the same way with and without.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from fastjepa.data.augment import normalise
from fastjepa.data.media import load_for_features
from fastjepa.data.moving_digits import MovingDigits
from fastjepa.features.extract import extract
from fastjepa.observe.atomic_file import atomic_file
from fastjepa.pictures import feature_sheet
from fastjepa.probes.knn import accuracy, knn
from fastjepa.probes.labelled_files import read_classes
from fastjepa.train.loop import Trainer

NEIGHBOURS = 5
# Longer clips would only take longer: what is asked for is what they show.
MOST_FRAMES = 16
_BATCH = 8


@dataclass(frozen=True)
class Labelled:
    """Clips uint8 [3, T, H, W] with their classes int64 [N]; the first `bank` name the others."""

    clips: Sequence[Tensor]
    classes: Tensor
    bank: int


def moving_digits(count: int, *, frames: int, fps: float, size: int) -> Labelled:
    """`count` clips of one handwritten digit each; no digit image is in both halves."""
    halves = {"train": count - count // 2, "test": count // 2}
    made = [
        MovingDigits(
            frames=frames, height=size, width=size, fps=fps, num_digits=1,
            split=split,  # type: ignore[arg-type]
        )[index]
        for split, number in halves.items()
        for index in range(number)
    ]  # fmt: skip
    clips = [torch.from_numpy(clip.frames).permute(3, 0, 1, 2).contiguous() for clip in made]
    return Labelled(clips, torch.tensor([clip.digits[0] for clip in made]), halves["train"])


def labelled_files(
    source: str, count: int, *, frames: int, fps: float, size: int, patch: int
) -> Labelled:
    """Up to `count` files of a folder of class folders or of a CSV, as many of each class.

    Of each class the first half of the files names, the other half is named. Raises ValueError
    where there are not two classes of two files, or a file cannot be read.
    """
    found = read_classes(source)
    files: list[list[str]] = [[] for _ in found.classes]
    for path, label in zip(found.paths, found.labels, strict=True):
        files[label].append(path)
    fewest, pairs = min(map(len, files)), count // (2 * len(files))
    if len(files) < 2 or fewest < 2 or pairs < 1:
        raise ValueError(
            f"evaluate.clips {source}: {len(files)} class(es), the smallest of {fewest} file(s); "
            f"expected at least 2 classes of 2 files, and evaluate.count ({count}) of 2 a class"
        )
    bank: list[tuple[str, int]] = []
    rest: list[tuple[str, int]] = []
    for label, paths in enumerate(files):
        some = paths[: 2 * pairs]
        middle = len(some) - len(some) // 2
        bank.extend((path, label) for path in some[:middle])
        rest.extend((path, label) for path in some[middle:])
    clips = [load_for_features(path, size, frames, fps, patch=patch) for path, _ in bank + rest]
    return Labelled(clips, torch.tensor([label for _, label in bank + rest]), len(bank))


@dataclass
class OnlineEvaluation:
    """Called by all ranks after every `every` steps; the first one writes the picture."""

    every: int
    labelled: Labelled
    _shown: list[Tensor] = field(default_factory=list)

    def __call__(self, trainer: Trainer) -> tuple[dict[str, float], Image.Image]:
        """`probe_knn/levelN`, and the picture, which is also `pictures/step-N.png` in the run."""
        self._shown = self._shown or [trainer.probe_clip(stream) for stream in trainer.loaders]
        picture, _ = feature_sheet(trainer, self._shown)
        if trainer.engine.ranks.first:
            folder = trainer.folder / "pictures"
            folder.mkdir(exist_ok=True)
            with atomic_file(folder / f"step-{trainer.step:08d}.png") as file:
                picture.save(file, format="png")
        return self._nearest(trainer), picture

    def _nearest(self, trainer: Trainer) -> dict[str, float]:
        bank, classes = self.labelled.bank, self.labelled.classes
        found = {}
        for level, x_ND in self._pooled(trainer).items():
            named = knn(x_ND[:bank], classes[:bank], x_ND[bank:], ks=(NEIGHBOURS,))[NEIGHBOURS]
            found[f"probe_knn/level{level}"] = accuracy(named, classes[bank:])
        return found

    def _pooled(self, trainer: Trainer) -> dict[int, Tensor]:
        """[N, D] of each supervised level, on the host."""
        jepa, engine = trainer.jepa, trainer.engine

        def encode(clip: Tensor, levels: Sequence[int]) -> list[Tensor]:
            found: list[list[Tensor]] = []
            engine.measure(lambda: found.append(jepa.target.features(clip, levels)))
            # As one token each: the maps of all clips together would be large.
            return [level.float().mean((1, 2, 3), keepdim=True) for level in found[0]]

        def inputs() -> Iterator[tuple[int, Tensor]]:
            for number, clip in enumerate(self.labelled.clips):
                yield number, normalise(clip)

        features = dict(extract(encode, inputs(), jepa.levels, batch=_BATCH, device=engine.device))
        return {
            level: torch.stack(
                [features[number][level].flatten() for number in range(len(features))]
            )
            for level in jepa.levels
        }
