"""Where a clip's CPU time goes in the PyAV path: opening, decoding, augmentation, normalisation."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray

from fastjepa.data.augment import normalise
from fastjepa.data.cache import DEFAULT
from fastjepa.data.decode_pyav import open_container
from fastjepa.data.decoder import Frame, FrameTransform
from fastjepa.data.files import Entry, Kind
from fastjepa.data.loader import Loader
from fastjepa.data.media import decode_media


def stages(files: Sequence[Entry], batches: int, settings: dict[str, Any]) -> dict[str, float]:
    """CPU seconds a clip of each stage, by `batches` batches made in this process with one thread.

    "decode" holds seeking, reading and the conversion to RGB; "augment" crop, resizing and flip.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        watch = _Watch()
        loader = Loader(**settings, datasets=[(files, 1.0)], decoder=watch)
        taken = 0.0
        for batch in loader.batches(0, batches):
            begin = time.process_time()
            normalise(batch.clip)
            taken += time.process_time() - begin
    finally:
        torch.set_num_threads(threads)
    done = batches * settings["batch"]
    return {
        "open": watch.opening / done,
        "decode": (watch.decoding - watch.augmenting - watch.opening) / done,
        "augment": watch.augmenting / done,
        "normalise": taken / done,
    }


class _Watch:
    """The loader's own decoder under a stopwatch."""

    def __init__(self) -> None:
        self.opening = self.decoding = self.augmenting = 0.0

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
        assert transform is not None

        def watched(frame: Frame) -> NDArray[Any]:
            begin = time.process_time()
            made = transform(frame)
            self.augmenting += time.process_time() - begin
            return made

        if kind == "video":
            begin = time.process_time()
            with open_container(path, DEFAULT):
                self.opening += time.process_time() - begin
        begin = time.process_time()
        clip = decode_media(
            path, kind, start_fraction=start_fraction, frames=frames, fps=fps, transform=watched
        )
        self.decoding += time.process_time() - begin
        return clip
