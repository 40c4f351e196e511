"""A step's number to its batch of clips: plan, decode, augment. Runs in the loader's workers.

Where a device decodes, a `cutter` takes the compressed pictures out of the files that the device
can have; the others are decoded here as ever.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from numpy.typing import NDArray

from fastjepa.data.augment import crop_resize_flip
from fastjepa.data.batch import Batch, ClipCutter, Sample, pack
from fastjepa.data.clip_plan import ClipPlan, plan_clip, sample_index
from fastjepa.data.decoder import ClipDecoder, DecodeError, Frame
from fastjepa.data.files import Kind
from fastjepa.data.mixture import Mixture
from fastjepa.data.quarantine import TooManyBadFiles

# Draws for one sample before giving up: with half of the draws good, 2**-256 is never seen.
MAX_ATTEMPTS = 256


@dataclass
class ClipSource:
    """Map-style data set over steps: `source[step]` is the step's whole batch, pure in the fields.

    A file that cannot be read is replaced by the sample's next attempt, so a restart meets the same
    clips. Files that failed as a whole are remembered, which saves opening them again and changes
    nothing else.
    """

    mixture: Mixture
    decoder: ClipDecoder
    batch: int
    frames: int
    fps: float
    crop: int
    scale: tuple[float, float]
    aspect: tuple[float, float]
    flip: float
    seed: int
    stream: int
    rank: int
    ranks: int
    extras: Callable[[int], object] | None
    cutter: ClipCutter | None = None
    _bad: dict[str, str] = field(default_factory=dict, init=False, repr=False)

    def __getitem__(self, step: int) -> Batch:
        """Make step's batch. Raises TooManyBadFiles when a sample finds no readable file."""
        bad: dict[str, str] = {}
        samples = [self.sample(step, slot, 0, bad) for slot in range(self.batch)]
        extras = None if self.extras is None else self.extras(step)
        if self.cutter is None:
            clip = torch.stack([sample.data for sample in samples])
            return Batch(step, clip, extras, list(bad.items()))
        data, parts = pack(samples)
        return Batch(step, data, extras, list(bad.items()), parts)

    def sample(self, step: int, slot: int, attempt: int, bad: dict[str, str]) -> Sample:
        """The first sample from draw `attempt` on whose file can be read.

        Files that failed on the way are added to `bad`. Raises TooManyBadFiles.
        """
        index = sample_index(step, rank=self.rank, ranks=self.ranks, batch=self.batch, slot=slot)
        draw = attempt
        for draw in range(attempt, MAX_ATTEMPTS):
            plan = plan_clip(
                self.seed,
                index,
                draw,
                scale=self.scale,
                aspect=self.aspect,
                flip=self.flip,
                stream=self.stream,
            )
            path, kind = self.mixture.pick(plan.dataset, plan.file)
            if path in self._bad:
                bad[path] = self._bad[path]
                continue
            try:
                return self._read(path, kind, plan, draw)
            except DecodeError as error:
                bad[path] = error.reason
                if error.whole_file:
                    self._bad[path] = error.reason
                    if len(self._bad) == self.mixture.num_files:
                        break
        path, reason = next(reversed(bad.items()))
        raise TooManyBadFiles(
            f"no readable file was found for sample {index} in {draw + 1} draws; "
            f"the last is {path}: {reason}",
            bad.items(),
        )

    def _read(self, path: str, kind: Kind, plan: ClipPlan, draw: int) -> Sample:
        if self.cutter is not None and kind == "video":
            found = self.cutter(
                path,
                start_fraction=plan.start,
                frames=self.frames,
                fps=self.fps,
                box=plan.box,
                flip=plan.flip,
            )
            if found is not None:
                data, cut = found
                return Sample(path, draw, torch.frombuffer(data, dtype=torch.uint8), cut)
        frames = self.decoder(
            path,
            kind,
            start_fraction=plan.start,
            frames=self.frames,
            fps=self.fps,
            transform=_Augment(plan, self.crop),
        )
        return Sample(path, draw, torch.from_numpy(frames).transpose(0, 1))


@dataclass(frozen=True)
class _Augment:
    """A plan's crop and mirroring, frame by frame: uint8 [H, W, 3] to [3, size, size]."""

    plan: ClipPlan
    size: int

    def __call__(self, frame: Frame) -> NDArray[Any]:
        box = self.plan.box(*frame.shape[:2])
        clip = crop_resize_flip(frame[None], box, self.plan.flip, self.size)
        square: NDArray[Any] = clip[:, 0].numpy()
        return square
