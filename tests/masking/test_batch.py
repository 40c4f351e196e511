"""The masks of a batch: index sets as the specification has them, distance weights, options."""

import pickle
from dataclasses import replace
from statistics import mean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastjepa.masking.batch import MaskMaker, counts, distance_weights
from fastjepa.masking.blocks import Blocks, covered
from fastjepa_kernels import packed_rows

SHORT, LONG = Blocks(8, (0.15, 0.15)), Blocks(2, (0.7, 0.7))
IMAGE = Blocks(10, (0.15, 0.15))
GRID = (8, 16, 16)


def maker(*groups: Blocks, batch: int = 4, grid: tuple[int, int, int] = GRID) -> MaskMaker:
    return MaskMaker(groups=groups or (SHORT, LONG), grid=grid, batch=batch, seed=1)


def is_index_set(index: Tensor, batch: int, tokens: int) -> bool:
    ascending = bool((index.diff(dim=1) > 0).all())
    inside = int(index.min()) >= 0 and int(index.max()) < tokens
    return index.shape[0] == batch and index.dtype == torch.int64 and ascending and inside


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_index_sets_ascend_and_are_disjoint(step: int, batch: int) -> None:
    masks = maker(batch=batch)(step)
    assert len(masks.context) == len(masks.predict) == 2
    for context, predict in zip(masks.context, masks.predict, strict=True):
        assert is_index_set(context, batch, 2048)
        assert is_index_set(predict, batch, 2048)
        for row, other in zip(context, predict, strict=True):
            assert not set(row.tolist()) & set(other.tolist())


def test_masks_are_a_pure_function_of_the_step() -> None:
    make = maker()
    first, again = make(7), pickle.loads(pickle.dumps(make))(7)
    for a, b in zip(first.context + first.predict, again.context + again.predict, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.context[0][:, :64], make(8).context[0][:, :64])
    other_rank = replace(make, rank=1)(7)
    assert other_rank.context[0].tolist() != first.context[0].tolist()


def test_groups_differ_even_with_equal_blocks() -> None:
    masks = maker(SHORT, SHORT)(0)
    assert masks.context[0].tolist() != masks.context[1].tolist()


def test_truncation_keeps_the_first_of_each_sample_up_to_the_poorest() -> None:
    make = maker(SHORT, batch=5)
    masks = make(3)
    hidden = torch.from_numpy(
        covered(SHORT, GRID, seed=1, step=3, rank=0, samples=range(5), group=0).reshape(5, -1)
    )
    for index, chosen in ((masks.context[0], ~hidden), (masks.predict[0], hidden)):
        keep = int(chosen.sum(1).min())
        assert index.shape == (5, keep)
        for row, mask in zip(index, chosen, strict=True):
            assert row.tolist() == mask.nonzero().flatten()[:keep].tolist()


def test_one_sample_is_not_truncated() -> None:
    masks = maker(batch=1)(0)
    for context, predict in zip(masks.context, masks.predict, strict=True):
        assert context.shape[1] + predict.shape[1] == 2048


def test_max_keep_bounds_the_context() -> None:
    masks = maker(replace(SHORT, max_keep=10))(0)
    assert masks.context[0].shape == (4, 10)
    assert masks.predict[0].shape == maker(SHORT)(0).predict[0].shape


def test_max_temporal_keep_leaves_late_frames_out_of_the_context() -> None:
    context = maker(replace(SHORT, max_temporal_keep=0.5))(0).context[0]
    assert int(context.max()) < 4 * 256


def test_full_complement_predicts_all_that_is_no_context() -> None:
    masks, plain = maker(replace(SHORT, full_complement=True))(0), maker(SHORT)(0)
    assert torch.equal(masks.context[0], plain.context[0])
    assert masks.predict[0].shape[1] == 2048 - plain.context[0].shape[1]


def test_pred_full_complement_sees_all_that_is_not_predicted() -> None:
    masks, plain = maker(replace(SHORT, pred_full_complement=True))(0), maker(SHORT)(0)
    assert torch.equal(masks.predict[0], plain.predict[0])
    assert masks.context[0].shape[1] == 2048 - plain.predict[0].shape[1]


def test_inv_block_swaps_context_and_predictions() -> None:
    masks, plain = maker(replace(SHORT, inv_block=True))(0), maker(SHORT)(0)
    assert torch.equal(masks.context[0], plain.predict[0])
    assert torch.equal(masks.predict[0], plain.context[0])


# Mean kept tokens of the official generator (300 batches and more of each setting).
@pytest.mark.parametrize(
    ("blocks", "grid", "batch", "context", "predict"),
    [
        (SHORT, (8, 16, 16), 1, 821, 1227),
        (SHORT, (8, 16, 16), 24, 506, 956),
        (LONG, (8, 16, 16), 24, 128, 1430),
        (IMAGE, (1, 16, 16), 36, 46, 132),
        (IMAGE, (1, 16, 16), 144, 37, 122),
        (IMAGE, (1, 32, 32), 72, 195, 505),
    ],
)
def test_kept_tokens_are_distributed_as_the_reference_has_them(
    blocks: Blocks, grid: tuple[int, int, int], batch: int, context: float, predict: float
) -> None:
    drawn = counts(replace(maker(blocks, batch=batch, grid=grid), weigh=False), range(120))
    assert mean(c for (c,), _ in drawn) == pytest.approx(context, rel=0.06)
    assert mean(p for _, (p,) in drawn) == pytest.approx(predict, rel=0.05)


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 20), st.integers(1, 20)),
    st.integers(0, 2**16), st.booleans(),
)  # fmt: skip
def test_distance_weights_are_those_of_all_pairs(
    grid: tuple[int, int, int], seed: int, offset: bool
) -> None:
    tokens = grid[0] * grid[1] * grid[2]
    if tokens < 2:
        return
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(2)])
    cut = 1 + seed % (tokens - 1)
    context, predict = order[:, :cut], order[:, cut:]
    weights = distance_weights(context, predict, grid, offset=offset)
    assert weights.dtype == torch.float32

    def place(index: Tensor) -> Tensor:
        return torch.stack(torch.unravel_index(index, grid), -1).double()

    distance = torch.cdist(place(context), place(predict)).amin(-1)
    if offset:
        distance = distance / max(1, grid[1] // 16)
    torch.testing.assert_close(weights.double(), distance**-0.5, rtol=1e-6, atol=0)
    if not offset:
        # A context token has a predicted neighbour at distance 1 at the nearest.
        assert weights.max().item() <= 1.0


def test_weights_come_with_the_masks_unless_left_out() -> None:
    make = maker()
    masks = make(0)
    assert masks.weights is not None
    for weight, context, predict in zip(masks.weights, masks.context, masks.predict, strict=True):
        assert torch.equal(weight, distance_weights(context, predict, GRID))
    assert replace(make, weigh=False)(0).weights is None
    large = maker(IMAGE, grid=(1, 32, 32))
    near, far = large(0).weights, replace(large, offset=True)(0).weights
    assert near is not None
    assert far is not None
    torch.testing.assert_close(far[0], near[0] * 2**0.5)


def test_masks_move_as_one() -> None:
    moved = maker()(0).to(torch.device("meta"))
    assert {t.device.type for t in (*moved.context, *moved.predict, *(moved.weights or ()))} == {
        "meta"
    }
    assert replace(maker(), weigh=False)(0).to(torch.device("cpu")).weights is None


def test_groups_that_leave_nothing_are_refused() -> None:
    nothing = Blocks(1, (0.5, 0.5), max_keep=0)
    with pytest.raises(ValueError, match="group 0 leaves 0 context"):
        maker(nothing)(0)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_without_truncation_every_clip_keeps_every_token(step: int, batch: int) -> None:
    make = maker(batch=batch)
    cut, whole = make(step), replace(make, truncate=False)(step)
    assert whole.clips == (*range(batch), *range(batch))
    assert whole.weights is not None
    for number, clip in enumerate(whole.clips):
        context, predict = whole.context[number][0], whole.predict[number][0]
        assert sorted([*context.tolist(), *predict.tolist()]) == list(range(2048))
        group = number // batch
        for mine, theirs in ((context, cut.context[group]), (predict, cut.predict[group])):
            assert torch.equal(mine[: theirs.shape[1]], theirs[clip])
        alone = distance_weights(context[None], predict[None], GRID)
        assert torch.equal(whole.weights[number], alone)


def test_exact_masks_fall_into_groups_of_all_clips() -> None:
    masks = replace(maker(batch=3), truncate=False)(0)
    groups = masks.by_group()
    assert [group.clips for group in groups] == [(0, 1, 2), (0, 1, 2)]
    assert torch.equal(groups[1].context[2], masks.context[5])
    (again,) = groups[1].by_group()
    assert again.context == groups[1].context


@pytest.mark.parametrize("truncate", [True, False])
def test_halves_of_a_group_are_its_clips_in_order(truncate: bool) -> None:
    group = replace(maker(batch=3), truncate=truncate)(0).by_group()[1]
    halves = group.halves()
    assert [half.sequences for half in halves] == [2, 1]
    assert [half.clips for half in halves] == ([(0,), (2,)] if truncate else [(0, 1), (2,)])
    for name in ("context", "predict", "weights"):
        rows = [row for half in halves for sets in getattr(half, name) for row in sets]
        whole = [row for sets in getattr(group, name) for row in sets]
        assert all(map(torch.equal, rows, whole))
    # The rows of all tokens are those of the whole group.
    packed = [packed_rows(half.context, 2048, half.clips) for half in halves]
    assert torch.equal(torch.cat(packed), packed_rows(group.context, 2048, group.clips))
    assert halves[1].halves() == [halves[1]]


def test_counts_of_exact_masks_are_their_means() -> None:
    make = replace(maker(batch=3), truncate=False)
    ((context, predict),) = counts(make, [4])
    masks = make(4)
    assert context[0] == sum(i.numel() for i in masks.context[:3]) // 3
    assert predict[1] == sum(i.numel() for i in masks.predict[3:]) // 3
