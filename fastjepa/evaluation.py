"""What a run is worth while it trains: a small probe and a PCA picture of fixed clips.

    evaluation = OnlineEvaluation(500, DigitProbe(128, frames=16, fps=4.0, size=256))
    metrics, picture = evaluation(trainer)

Both look at the averaged encoder. Nothing is drawn from a random generator and nothing is taken
from the run's data, so a run goes the same way with and without.
Shapes: B clips, T frames, H and W pixels, T', H', W' grid, D channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from fastjepa.data.augment import normalise
from fastjepa.data.media import load_for_features
from fastjepa.data.moving_digits import MovingDigits
from fastjepa.durable import atomic_file
from fastjepa.features.extract import Encode, extract
from fastjepa.pictures import feature_sheet
from fastjepa.probes.knn import accuracy, knn
from fastjepa.probes.labelled_files import read_classes
from fastjepa.probes.ridge import Moments, explained, ridge
from fastjepa.train.loop import Trainer

NEIGHBOURS = 5
# Longer clips would only take longer: what is asked for is what they show.
MOST_FRAMES = 16
_BATCH = 8


class Probe(Protocol):
    """What features of fixed clips know, as metrics `probe_.../levelN`."""

    def __call__(
        self, encode: Encode, levels: Sequence[int], device: torch.device
    ) -> dict[str, float]: ...


class DigitProbe:
    """Where the digit is, in clips of one that moves over a texture: `probe_r2/levelN`.

    A linear map from a patch's features to the share of it that the digit covers is fitted on one
    half of the clips; its R^2 is of the other half, with digit images that the first has not.
    """

    def __init__(
        self, count: int, *, frames: int, fps: float, size: int, patch: int = 16, tubelet: int = 2
    ) -> None:
        def made(split: str, number: int) -> tuple[Tensor, Tensor]:
            source = MovingDigits(
                frames=frames, height=size, width=size, fps=fps, num_digits=1,
                split=split,  # type: ignore[arg-type]
            )  # fmt: skip
            clips = [source[index] for index in range(number)]
            frames_BTHWC = torch.stack([torch.from_numpy(clip.frames) for clip in clips])
            inside = torch.stack([torch.from_numpy(clip.mask) for clip in clips]).bool().float()
            deep = 1 if frames == 1 else tubelet
            cut = inside.unfold(1, deep, deep).unfold(2, patch, patch).unfold(3, patch, patch)
            return frames_BTHWC.permute(0, 4, 1, 2, 3).contiguous(), cut.mean((4, 5, 6))

        self.fit = made("train", count - count // 2)
        self.test = made("test", count // 2)

    def __call__(
        self, encode: Encode, levels: Sequence[int], device: torch.device
    ) -> dict[str, float]:
        fit, test = (self._moments(part, encode, levels, device) for part in (self.fit, self.test))
        return {
            f"probe_r2/level{level}": explained(ridge(fit[level]), test[level]) for level in levels
        }

    def _moments(
        self,
        part: tuple[Tensor, Tensor],
        encode: Encode,
        levels: Sequence[int],
        device: torch.device,
    ) -> dict[int, Moments]:
        found: dict[int, Moments] = {}
        for clips, covers in zip(*(tensor.split(_BATCH) for tensor in part), strict=True):
            features = encode(normalise(clips.to(device)), levels)
            for level, x_BTHWD in zip(levels, features, strict=True):
                sums = found.setdefault(level, Moments(x_BTHWD.shape[-1], device))
                sums.add(x_BTHWD.flatten(0, 3), covers.flatten().to(device))
        return found


class ClassProbe:
    """What labelled files show, by their neighbours: `probe_knn/levelN`, the share named rightly.

    `source` is a folder of class folders or a CSV. Up to `count` files, as many of each class: the
    first half of each names, by mean features, the other half. Raises ValueError where there are
    not two classes of two files, or a file cannot be read.
    """

    def __init__(
        self, source: str, count: int, *, frames: int, fps: float, size: int, patch: int
    ) -> None:
        found = read_classes(source)
        files: list[list[str]] = [[] for _ in found.classes]
        for path, label in zip(found.paths, found.labels, strict=True):
            files[label].append(path)
        fewest, pairs = min(map(len, files)), count // (2 * len(files))
        if len(files) < 2 or fewest < 2 or pairs < 1:
            raise ValueError(
                f"evaluate.clips {source}: {len(files)} class(es), the smallest of {fewest} "
                f"file(s); expected at least 2 classes of 2 files, and evaluate.count ({count}) of "
                "2 a class"
            )
        bank: list[tuple[str, int]] = []
        rest: list[tuple[str, int]] = []
        for label, paths in enumerate(files):
            some = paths[: 2 * pairs]
            middle = len(some) - len(some) // 2
            bank.extend((path, label) for path in some[:middle])
            rest.extend((path, label) for path in some[middle:])
        self.bank = len(bank)
        self.classes = torch.tensor([label for _, label in bank + rest])
        self.clips = [
            load_for_features(path, size, frames, fps, patch=patch) for path, _ in bank + rest
        ]

    def __call__(
        self, encode: Encode, levels: Sequence[int], device: torch.device
    ) -> dict[str, float]:
        def pooled(clip: Tensor, levels: Sequence[int]) -> list[Tensor]:
            # As one token each: the maps of all clips together would be large.
            return [level.mean((1, 2, 3), keepdim=True) for level in encode(clip, levels)]

        inputs = ((number, normalise(clip)) for number, clip in enumerate(self.clips))
        features = dict(extract(pooled, inputs, levels, batch=_BATCH, device=device))
        found = {}
        for level in levels:
            x_ND = torch.stack(
                [features[number][level].flatten() for number in range(len(features))]
            )
            bank_ND, rest_ND = x_ND.tensor_split([self.bank])
            known, wanted = self.classes.tensor_split([self.bank])
            k = min(NEIGHBOURS, self.bank)
            named = knn(bank_ND, known, rest_ND, ks=(k,))[k]
            found[f"probe_knn/level{level}"] = accuracy(named, wanted)
        return found


@dataclass
class OnlineEvaluation:
    """Called by all ranks after every `every` steps; the first one writes the picture."""

    every: int
    probe: Probe
    _shown: list[Tensor] = field(default_factory=list)

    def __call__(self, trainer: Trainer) -> tuple[dict[str, float], Image.Image]:
        """The probe's metrics and the picture, which is also `pictures/step-N.png` in the run."""
        engine, target = trainer.engine, trainer.jepa.target
        self._shown = self._shown or trainer.probe_clips()
        picture, _ = feature_sheet(trainer, self._shown)
        if engine.ranks.first:
            folder = trainer.folder / "pictures"
            folder.mkdir(exist_ok=True)
            with atomic_file(folder / f"step-{trainer.step:08d}.png") as file:
                picture.save(file, format="png")

        def encode(clip: Tensor, levels: Sequence[int]) -> list[Tensor]:
            found: list[list[Tensor]] = []
            # Weights that the engine gathers as it goes must not become inference's own.
            with torch.inference_mode(False):
                engine.measure(lambda: found.append(target.features(clip, levels)))
            return [level.float() for level in found[0]]

        return self.probe(encode, trainer.jepa.levels, engine.device), picture
