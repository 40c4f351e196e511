"""Is every frame that a loader gives the one that was asked for? Tried on numbered videos.

    videos = [write_numbered(folder, n, codec=codec) for n, codec in enumerate(encodable())]
    print(count_wrong_frames(videos, partial(Loader, decoder=my_decoder)))

Clips are drawn as in training, shuffled over the files. Each frame says which it is, and is held
against the frame on screen at the time that the plan of its sample asks for.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastjepa.data.batch import BatchSource
from fastjepa.data.decoder import FrameTransform
from fastjepa.data.files import Entry, Kind
from fastjepa.data.loader import Loader
from fastjepa.data.numbered import NumberedVideo, read_number

# Files keep times in ticks of up to a millisecond: this near to a change, either frame is right.
_TICK = 0.001
_CROP = 64


@dataclass
class FrameCount:
    """Frames looked at, by codec, and a sentence for each that was not the one asked for."""

    looked_at: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        what = f"{self.looked_at.total()} frames of {', '.join(sorted(self.looked_at))}"
        if not self.wrong:
            return f"{what}: each the one asked for"
        return f"{len(self.wrong)} wrong in {what}: {self.wrong[0]}"


def count_wrong_frames(
    videos: Sequence[NumberedVideo],
    open_loader: Callable[..., BatchSource] = Loader,
    *,
    batches: Sequence[int] = (1, 16),
    clips: int = 32,
    frames: int = 8,
    fps: float = 7.0,
    seed: int = 0,
) -> FrameCount:
    """Draw at least `clips` clips in batches of each size, and read the number of each frame.

    `open_loader` takes `Loader`'s keyword arguments; its clips are uint8 or normalised. `videos`
    are of one size. A file that the loader calls bad counts as a wrong frame.
    """
    count = FrameCount()
    by_path = {str(video.path): video for video in videos}
    aspect = videos[0].width / videos[0].height
    for batch in batches:
        asked = _Asked()
        settings: dict[str, Any] = {
            "datasets": [([Entry(path, "video") for path in by_path], 1.0)],
            "batch": batch,
            "frames": frames,
            "fps": fps,
            "crop": _CROP,
            "scale": (1.0, 1.0),
            "aspect": (aspect, aspect),
            "flip": 0.0,
            "seed": seed + batch,
        }
        steps = -(-clips // batch)
        plain = Loader(**settings, decoder=asked)
        loader = open_loader(**settings)
        for one, _ in zip(loader.batches(0, steps), plain.batches(0, steps), strict=True):
            count.wrong += [f"{path} is called bad: {reason}" for path, reason in one.bad]
            for clip, (path, start) in zip(one.clip, asked.take(), strict=True):
                video = by_path[path]
                count.looked_at[video.codec] += frames
                begin = start * max(0.0, video.frames / video.fps - frames / fps)
                for i, picture in enumerate(clip.permute(1, 2, 3, 0).cpu().numpy()):
                    sentence = _compare(picture, video, begin + i / fps)
                    count.wrong += [f"batch of {batch}, {sentence}"] if sentence else []
        loader.close()
    return count


def _compare(picture: NDArray[Any], video: NumberedVideo, time: float) -> str | None:
    """None if the picture is the video's at `time`, else what it is instead."""
    last = video.frames - 1
    wanted = {min(last, max(0, int((time + slack) * video.fps))) for slack in (-_TICK, _TICK)}
    found = read_number(picture)
    if found is not None and found[0] == video.number and found[1] in wanted:
        return None
    came = "no number" if found is None else f"frame {found[1]} of video {found[0]}"
    return f"{video.codec}: frame {max(wanted)} of video {video.number} was asked for, {came} came"


class _Asked:
    """A decoder that decodes nothing and notes what it was asked for."""

    def __init__(self) -> None:
        self._noted: list[tuple[str, float]] = []

    def __call__(
        self,
        path: str,
        kind: Kind,
        *,
        start_fraction: float,
        frames: int,
        fps: float,
        transform: FrameTransform | None = None,
    ) -> NDArray[Any]:
        self._noted.append((path, start_fraction))
        blank = np.zeros((_CROP, _CROP, 3), np.uint8)
        return np.stack([blank if transform is None else transform(blank)] * frames)

    def take(self) -> list[tuple[str, float]]:
        noted, self._noted = self._noted, []
        return noted
