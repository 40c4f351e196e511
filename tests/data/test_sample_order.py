"""A restart goes on with the very next sample: none lost, none twice.

What must stay is how many samples a step takes: ranks x accumulated batches x batch. Workers may
change, and ranks, batch and accumulation too as long as their product does not.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fastjepa.data.decoder import DecodeError
from fastjepa.data.files import Entry
from fastjepa.data.loader import Loader
from fastjepa.data.manifest import read_manifest

CROP = 4
FILES = [Entry(f"/{number}.mp4", "video", 1.0 + number % 3) for number in range(50)]


def fingerprint(path: str, kind: str, **asked: Any) -> np.ndarray:
    """In the place of a decoder: pixels [1, 3, 4, 4] that tell files, times and crops apart.

    One file in ten is bad, and so is one place in ten of every other: each by its content alone.
    """
    digest = hashlib.sha256(repr((path, kind, asked)).encode()).digest()
    number = int(Path(path).stem)
    if number % 10 == 3 or digest[0] < 25:
        raise DecodeError(path, "bad", whole_file=number % 10 == 3)
    return np.resize(np.frombuffer(digest, np.uint8), (1, 3, CROP, CROP))


class Layout:
    """How a run is spread: ranks, batches of each in a step, clips of a batch, worker processes."""

    def __init__(self, ranks: int, accumulate: int, batch: int, workers: int = 0) -> None:
        self.ranks, self.accumulate, self.batch, self.workers = ranks, accumulate, batch, workers

    def __repr__(self) -> str:
        return f"Layout({self.ranks}, {self.accumulate}, {self.batch}, {self.workers})"

    def samples(self, start: int, stop: int, **changes: Any) -> list[bytes]:
        """The samples of the steps start..stop-1, in the order of their numbers."""
        loaders = [
            Loader(rank=rank, ranks=self.ranks, batch=self.batch, workers=self.workers, **changes)
            for rank in range(self.ranks)
        ]
        first, last = start * self.accumulate, stop * self.accumulate
        parts = [loader.batches(first, last) for loader in loaders]
        found = [
            clip.numpy().tobytes()
            for batches in zip(*parts, strict=True)
            for batch in batches
            for clip in batch.clip
        ]
        for loader in loaders:
            loader.close()
        return found


@st.composite
def layouts(draw: st.DrawFn, samples: int, most_ranks: int, workers: Sequence[int]) -> Layout:
    """Any way to take `samples` samples a step."""
    ranks = draw(st.sampled_from([r for r in range(1, most_ranks + 1) if samples % r == 0]))
    rest = samples // ranks
    accumulate = draw(st.sampled_from([a for a in range(1, rest + 1) if rest % a == 0]))
    return Layout(ranks, accumulate, rest // accumulate, draw(st.sampled_from(workers)))


PLAIN = {
    "datasets": [(FILES[:20], 0.3), (FILES[20:], 0.7)], "frames": 1, "fps": 4.0, "crop": CROP,
    "scale": (0.3, 1.0), "aspect": (0.75, 1.35), "flip": 0.5, "decoder": fingerprint,
    "max_bad_share": 1.0,
}  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(
    st.data(),
    st.integers(1, 16),
    st.integers(0, 2**32),
    st.lists(st.integers(0, 4), min_size=1, max_size=3),
)
def test_restarts_never_lose_or_repeat_a_sample(
    data: st.DataObject, per_step: int, seed: int, lengths: list[int]
) -> None:
    """Runs of 0 to 4 steps, one after the other, each spread in another way."""
    settings = PLAIN | {"seed": seed}
    found: list[bytes] = []
    step = 0
    for length in lengths:
        layout = data.draw(layouts(per_step, most_ranks=8, workers=[0]))
        found += layout.samples(step, step + length, **settings)
        step += length
    straight = Layout(1, 1, per_step).samples(0, step, **settings)
    assert found == straight
    assert len(set(straight)) == len(straight)


@settings(deadline=None, max_examples=3)
@given(st.data(), st.integers(1, 3), st.integers(1, 2))
def test_restarts_with_worker_processes_on_real_videos(
    clips: Path, data: st.DataObject, stop: int, more: int
) -> None:
    real = {
        "datasets": [(read_manifest(str(clips)), 1.0)], "frames": 2, "fps": 4.0, "crop": 32,
        "scale": (0.3, 1.0), "aspect": (0.75, 1.35), "flip": 0.5, "seed": 3,
    }  # fmt: skip
    before = data.draw(layouts(4, most_ranks=2, workers=[1, 2]))
    after = data.draw(layouts(4, most_ranks=2, workers=[0, 1, 2]))
    found = before.samples(0, stop, **real) + after.samples(stop, stop + more, **real)
    assert found == Layout(1, 1, 4).samples(0, stop + more, **real)


def test_another_number_of_samples_a_step_would_repeat_some() -> None:
    """Why it is refused (tests/train/test_resume.py)."""
    settings = PLAIN | {"seed": 0}
    before = Layout(2, 1, 4).samples(0, 3, **settings)
    after = Layout(1, 1, 4).samples(3, 4, **settings)
    assert after == before[12:16]
