"""Images and videos over ranks: every sample of each is read once."""

from collections import defaultdict

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fastjepa.data.clip_plan import sample_index
from fastjepa.data.rank_roles import Role, role_of


@given(st.integers(1, 64), st.floats(0.0, 1.0), st.integers(1, 4), st.integers(0, 100))
def test_every_sample_of_a_role_is_read_once(
    ranks: int, ratio: float, batch: int, step: int
) -> None:
    assume(ratio == 0.0 or int(ranks * ratio) >= 1)
    read: dict[str, list[int]] = defaultdict(list)
    for rank in range(ranks):
        role = role_of(rank, ranks, ratio)
        read[role.modality] += [
            sample_index(step, rank=role.rank, ranks=role.ranks, batch=batch, slot=slot)
            for slot in range(batch)
        ]
    images = int(ranks * ratio)
    for modality, count in (("image", images), ("video", ranks - images)):
        first = step * count * batch
        assert read[modality] == list(range(first, first + count * batch))


def test_the_first_ranks_read_images() -> None:
    roles = [role_of(rank, 4, 0.5) for rank in range(4)]
    assert roles == [
        Role("image", 0, 2), Role("image", 1, 2), Role("video", 0, 2), Role("video", 1, 2)
    ]  # fmt: skip
    assert role_of(0, 4, 0.3) == Role("image", 0, 1)


def test_one_modality_alone() -> None:
    assert role_of(2, 3, 0.0) == Role("video", 2, 3)
    assert role_of(2, 3, 1.0) == Role("image", 2, 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((4, 4, 0.5), "rank is 4, expected 0 to ranks - 1 = 3"),
        ((0, 4, 1.5), "image_ratio is 1.5, expected 0 to 1"),
        ((0, 4, 0.2), "0.2 of 4 ranks leaves none to images; expected at least 0.25, or 0"),
        ((0, 1, 0.5), "0.5 of 1 ranks leaves none to images; expected at least 1, or 0"),
    ],
)
def test_roles_that_cannot_be(arguments: tuple[int, int, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        role_of(*arguments)
