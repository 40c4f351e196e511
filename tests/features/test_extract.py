"""Whatever the mix of shapes, every input gets its own features."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastjepa.features.extract import extract

SHAPES = [(3, 4, 8, 8), (3, 1, 8, 8), (3, 2, 4, 12)]


class Means:
    """An encoder whose features are the means of 2 x 4 x 4 patches, plus the level."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []

    def __call__(self, clip_B3THW: Tensor, levels: list[int]) -> list[Tensor]:
        assert torch.is_inference_mode_enabled()
        self.batches.append(tuple(clip_B3THW.shape))
        tubelet = 1 if clip_B3THW.shape[2] == 1 else 2
        pooled = torch.nn.functional.avg_pool3d(clip_B3THW, (tubelet, 4, 4))
        return [pooled.movedim(1, -1) + level for level in levels]


def clips(kinds: list[int]) -> list[tuple[str, Tensor]]:
    return [(f"clip{i}", torch.full(SHAPES[kind], float(i))) for i, kind in enumerate(kinds)]


@settings(deadline=None)
@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 5))
def test_every_input_comes_back_once_with_its_features(kinds: list[int], batch: int) -> None:
    encoder = Means()
    found = dict(extract(encoder, clips(kinds), [5, 11], batch=batch))
    assert len(found) == len(kinds)
    for name, clip in clips(kinds):
        _, frames, height, width = clip.shape
        grid = (max(1, frames // 2), height // 4, width // 4)
        for level in (5, 11):
            assert found[name][level].shape == (*grid, 3)
            assert (found[name][level] == clip.mean() + level).all()
    assert all(shape[0] <= batch for shape in encoder.batches)


def test_one_shape_goes_through_together() -> None:
    encoder = Means()
    list(extract(encoder, clips([0, 1, 0, 1, 0, 1, 0]), [0], batch=4))
    assert encoder.batches == [(4, 3, 4, 8, 8), (3, 3, 1, 8, 8)]


def test_inputs_are_read_only_as_far_as_needed() -> None:
    read = []

    def endless() -> object:
        for i in range(10**9):
            read.append(i)
            yield f"clip{i}", torch.zeros(3, 1, 4, 4 * (1 + i % 50))

    next(extract(Means(), endless(), [0], batch=2))  # type: ignore[arg-type]
    assert len(read) <= 8


def test_features_do_not_hold_their_batch() -> None:
    for _, by_level in extract(Means(), clips([0, 0, 0, 0]), [0], batch=4):
        assert by_level[0].untyped_storage().nbytes() == by_level[0].nbytes


@pytest.mark.parametrize(
    "clip",
    [torch.zeros(3, 8, 8), torch.zeros(1, 3, 2, 8, 8), torch.zeros(3, 2, 8, 8, dtype=torch.uint8)],
)
def test_an_input_that_is_no_clip_is_named(clip: Tensor) -> None:
    with pytest.raises(ValueError, match=r"one\.mp4: expected a float clip \[3, T, H, W\]"):
        list(extract(Means(), [("one.mp4", clip)], [0]))


def test_an_encoder_that_does_not_keep_its_word_is_told_so() -> None:
    def flat(clip: Tensor, levels: list[int]) -> list[Tensor]:
        return [clip.flatten(1)]

    for levels in ([0], [0, 1]):
        with pytest.raises(ValueError, match=r"expected . outputs \[1, T', H', W', D\]"):
            list(extract(flat, clips([0]), levels))  # type: ignore[arg-type]


def test_nothing_to_do_is_refused() -> None:
    for levels, batch in (([], 8), ([1], 0)):
        with pytest.raises(ValueError, match="batch >= 1 and some levels"):
            list(extract(Means(), [], levels, batch=batch))
