"""Images and videos over ranks: every sample is read once, and what each rank's loss weighs."""

from collections import defaultdict

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fastjepa.config.resolve import resolve
from fastjepa.config.schema import Recipe
from fastjepa.data.clip_plan import sample_index
from fastjepa.estimate import StreamCosts
from fastjepa.roles import RankShare, share_of

SMALL = {
    "model": {"name": "vit_tiny", "depth": 2, "predictor": {"width": 48, "depth": 1, "heads": 2}},
    "data": {
        "video": "clips", "image": "stills", "frames": 4, "crop": 64, "batch": 3, "image_batch": 5,
    },
}  # fmt: skip
LENGTHS = [{"frames": 8, "batch": 1, "share": 0.25}]


def recipe(**changes: object) -> Recipe:
    """`SMALL` with some of `data`'s keys or whole sections replaced."""
    data = SMALL["data"] | {k: v for k, v in changes.items() if k in ("lengths", "mix", "image")}  # type: ignore[operator]
    rest = {key: value for key, value in changes.items() if key not in data}
    return Recipe.model_validate(SMALL | {"data": data} | rest)


def shares(ranks: int, ratio: float | None, **changes: object) -> list[RankShare]:
    chosen = recipe(ranks={"rank_ratio": ratio}, **changes)
    resolved = resolve(chosen)
    return [share_of(chosen, resolved, rank=rank, ranks=ranks) for rank in range(ranks)]


@given(st.integers(2, 64), st.floats(0.01, 0.99), st.integers(0, 100))
def test_every_sample_of_a_modality_is_read_once(ranks: int, ratio: float, step: int) -> None:
    assume(0 < int(ranks * ratio) < ranks)
    read: dict[str, list[int]] = defaultdict(list)
    for share in shares(ranks, ratio):
        ((name, stream),) = share.streams.items()
        read[name] += [
            sample_index(step, rank=share.rank, ranks=share.ranks, batch=stream.clips, slot=slot)
            for slot in range(stream.clips)
        ]
    images = int(ranks * ratio)
    for name, count, batch in (("image", images, 5), ("video", ranks - images, 3)):
        first = step * count * batch
        assert read[name] == list(range(first, first + count * batch))


def test_the_first_ranks_take_images() -> None:
    found = shares(4, 0.3)
    assert [list(share.streams) for share in found] == [["image"], ["video"], ["video"], ["video"]]
    assert [(share.rank, share.ranks) for share in found] == [(0, 1), (0, 3), (1, 3), (2, 3)]
    assert {share.weight for share in found} == {1.0}
    assert all(share.samples_per_step == {"video": 9, "image": 5} for share in found)


def test_without_a_ratio_every_rank_takes_all() -> None:
    for rank, share in enumerate(shares(3, None)):
        assert list(share.streams) == ["video", "image"]
        assert (share.rank, share.ranks, share.mix) == (rank, 3, "accumulate")
        assert share.samples_per_step == {"video": 9, "image": 15}


def test_one_rank_alternates() -> None:
    (share,) = shares(1, 0.5)
    assert share.mix == "alternate"
    assert {name: one.share for name, one in share.streams.items()} == {"video": 0.5, "image": 0.5}
    assert share.samples_per_step == {"video": 1.5, "image": 2.5}


def test_half_the_ranks_and_twice_the_micro_batches_take_the_same_samples() -> None:
    four, two, one = (
        shares(ranks, 0.5, optim={"accumulate": 4 // ranks})[0].samples_per_step
        for ranks in (4, 2, 1)
    )
    assert four == two == one == {"video": 6, "image": 10}


def test_video_ranks_share_out_their_lengths() -> None:
    image, video = shares(2, 0.5, lengths=LENGTHS, mix="alternate")
    assert list(image.streams) == ["image"]
    assert {name: one.share for name, one in video.streams.items()} == {
        "video": 0.75, "video_8f": 0.25,
    }  # fmt: skip
    assert video.samples_per_step == {"video": 2.25, "video_8f": 0.25, "image": 5}


def test_ranks_of_equal_work_weigh_images_and_videos_as_before() -> None:
    chosen = recipe(ranks={"rank_ratio": 0.5, "balance": "work"})
    resolved = resolve(chosen)
    found = [share_of(chosen, resolved, rank=rank, ranks=8) for rank in range(8)]
    weights = {"image": 0.0, "video": 0.0}
    work, costs = [], StreamCosts(chosen, resolved)
    for share in found:
        ((name, stream),) = share.streams.items()
        weights[name] += share.weight / len(found)
        work.append(costs.part(stream).flops.total)
    assert weights == pytest.approx({"image": 0.5, "video": 0.5})
    assert max(work) / min(work) <= 1.05


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": ()}, r"rank_ratio: 0\.5 splits .* data\.image is empty"),
        ({"lengths": LENGTHS}, "data.mix: accumulate .* expected alternate"),
    ],
)
def test_recipes_that_cannot_have_roles(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        shares(2, 0.5, **changes)


@pytest.mark.parametrize(("ranks", "ratio"), [(4, 0.2), (2, 0.4)])
def test_ranks_too_few_for_the_ratio(ranks: int, ratio: float) -> None:
    with pytest.raises(ValueError, match=f"{ratio} of {ranks} ranks leaves 0 for images"):
        shares(ranks, ratio)


def test_equal_work_needs_a_ratio() -> None:
    with pytest.raises(ValueError, match="balance: work needs a rank_ratio"):
        recipe(ranks={"balance": "work"})
