"""The official `VideoDataset` with decord, its augmentation and its loader, from a checkout.

Nothing of the checkout is copied. torchvision, pandas and OpenCV, which it imports, are stood in
for where they are not installed: this path calls none of them (checkout.py).
"""

import importlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastjepa.bench.checkout import make_importable
from fastjepa.bench.data_results import Setting
from fastjepa.data.frame_identity import FrameCount
from fastjepa.data.numbered import NumberedVideo, read_number

# Its recipes' crops.
_SCALE, _ASPECT = (0.3, 1.0), (0.75, 1.35)
# Entries of the list it walks through, files over and over.
_LONG = 200_000


def import_data_set(checkout: Path) -> Any:
    """Its module of the data set. Raises ValueError for no checkout, and without decord."""
    make_importable(checkout, data=True)
    # Composed when the augmentation is made, called only by the automatic one.
    transforms = sys.modules["torchvision.transforms"]
    if not hasattr(transforms, "Compose"):
        transforms.Compose = list  # type: ignore[attr-defined]
    try:
        return importlib.import_module("src.datasets.video_dataset")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--reference needs {error.name}, which is not installed: pip install eva-decord"
        ) from error


def official_clips(checkout: Path, paths: Sequence[str], setting: Setting) -> Iterator[Tensor]:
    """Batches float32 [B, 3, T, S, S], normalised, as its training loads them."""
    module = import_data_set(checkout)
    augment = importlib.import_module("app.vjepa_2_1.transforms").make_transforms(
        random_horizontal_flip=True,
        random_resize_aspect_ratio=_ASPECT,
        random_resize_scale=_SCALE,
        crop_size=setting.crop,
    )
    with tempfile.TemporaryDirectory() as folder:
        _, loader, _ = module.make_videodataset(
            data_paths=[_listed(Path(folder), paths, _LONG)],
            batch_size=setting.batch,
            dataset_fpcs=[setting.frames],
            fps=_whole(setting.fps),
            frame_step=None,
            transform=augment,
            collator=_stacked,
            num_workers=setting.workers,
            pin_mem=False,
        )
    yield from loader


def count_wrong(checkout: Path, videos: Sequence[NumberedVideo], frames: int) -> FrameCount:
    """Read the number of each frame that its decoding gives, against the frame it asked for."""
    module = import_data_set(checkout)
    count = FrameCount()
    with tempfile.TemporaryDirectory() as folder:
        listed = _listed(Path(folder), [str(video.path) for video in videos], len(videos))
        data = module.VideoDataset(
            [listed], frames_per_clip=frames, fps=8, frame_step=None, transform=None
        )
    np.random.seed(0)
    for video in [*videos] * 4:
        pictures, asked = data.loadvideo_decord(str(video.path), frames)
        if not len(pictures):
            count.wrong.append(f"{video.codec}: video {video.number} was not read")
            continue
        count.looked_at[video.codec] += len(pictures)
        for picture, frame in zip(pictures, asked[0], strict=True):
            found = read_number(picture)
            if found != (video.number, frame):
                came = "no number" if found is None else f"frame {found[1]} of video {found[0]}"
                count.wrong.append(
                    f"{video.codec}: frame {frame} of video {video.number} was asked for, "
                    f"{came} came"
                )
    return count


def _listed(folder: Path, paths: Sequence[str], length: int) -> str:
    """A list of `length` files or a few more, in the form that needs no pandas."""
    file = folder / "files.npy"
    times = -(-length // len(paths))
    np.save(file, np.array([*paths] * times, dtype=object), allow_pickle=True)
    return str(file)


def _whole(fps: float) -> float:
    """It divides whole numbers of frames a second, and makes float counts of others."""
    return int(fps) if float(fps).is_integer() else fps


def _stacked(samples: Sequence[Any]) -> Tensor:
    return torch.stack([clips[0] for clips, _, _ in samples])
