import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastjepa.data.files import Entry
from fastjepa.data.mixture import Mixture


def _entries(name: str, count: int, weights: list[float] | None = None) -> list[Entry]:
    weights = weights or [1.0] * count
    return [Entry(f"/{name}/{i}.mp4", "video", weights[i]) for i in range(count)]


def test_a_file_weighs_its_data_sets_weight_over_its_number_of_files() -> None:
    """The reference's rule: probability = weight of the data set / files in it."""
    mixture = Mixture(
        [(_entries("a", 3), 0.3), (_entries("b", 7), 0.7 * 2), (_entries("c", 1), 0.3)]
    )
    grid = (np.arange(400) + 0.5) / 400
    counts = Counter(mixture.pick(u, v)[0] for u in grid for v in grid)
    for name, share in (("a", 0.15), ("b", 0.7), ("c", 0.15)):
        files = {path: n for path, n in counts.items() if path.startswith(f"/{name}/")}
        expected = share / len(files)
        assert all(abs(n / 160_000 - expected) < 0.05 * expected for n in files.values())


def test_weights_of_files_and_kinds() -> None:
    entries = [
        Entry("/é.mp4", "video", 0.0),
        Entry("/b.png", "image", 3.0),
        Entry("/c.mp4", "video"),
    ]
    mixture = Mixture([(entries, 1.0)])
    picks = Counter(mixture.pick(0.5, (i + 0.5) / 400) for i in range(400))
    assert picks == {("/b.png", "image"): 300, ("/c.mp4", "video"): 100}
    assert mixture.num_files == 3


@given(
    st.lists(st.lists(st.floats(0.0, 10.0), min_size=1, max_size=5), min_size=1, max_size=4),
    st.floats(0.0, 1.0, exclude_max=True),
    st.floats(0.0, 1.0, exclude_max=True),
)
def test_every_draw_gives_a_file_that_has_weight(
    weights: list[list[float]], u: float, v: float
) -> None:
    data = [
        ([Entry(f"{i}/{j}", "image", w) for j, w in enumerate([*ws, 1.0])], 1.0 + i)
        for i, ws in enumerate(weights)
    ]
    path, _ = Mixture(data).pick(u, v)
    i, j = map(int, path.split("/"))
    assert data[i][0][j].weight > 0.0


def test_a_million_files_travel_in_little_more_than_their_names() -> None:
    entries = [Entry(f"/data/videos/{i:07d}.mp4", "video") for i in range(200_000)]
    mixture = Mixture([(entries, 1.0)])
    packed = pickle.dumps(mixture)
    assert len(packed) < 200_000 * (len(entries[0].path) + 10)
    assert pickle.loads(packed).pick(0.0, 0.5) == (entries[100_000].path, "video")


@pytest.mark.parametrize(
    ("datasets", "words"),
    [
        ([], "none given"),
        ([([], 1.0)], r"datasets\[0\]: no files"),
        ([(_entries("a", 1), 0.0)], "weight is 0.0"),
        ([(_entries("a", 1), float("nan"))], "weight is nan"),
        ([(_entries("a", 2, [0.0, 0.0]), 1.0)], "not all 0"),
        ([(_entries("a", 2, [1.0, -1.0]), 1.0)], "finite, 0 or more"),
    ],
)
def test_weights_that_do_not_fit(datasets: list, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Mixture(datasets)
