"""Distances to the nearest predicted token: exact, whatever the grid."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastjepa_kernels import mask_distance
from fastjepa_kernels.mask_distance import reference


@st.composite
def masks(draw: st.DrawFn) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
    grid = draw(st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)))
    tokens = grid[0] * grid[1] * grid[2]
    batch = draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    context, predict = draw(st.integers(1, tokens)), draw(st.integers(1, tokens))

    def choose(count: int) -> Tensor:
        rows = [torch.randperm(tokens, generator=generator)[:count] for _ in range(batch)]
        return torch.stack(rows)

    return choose(context), choose(predict), grid


@settings(max_examples=100, deadline=None)
@given(masks(), st.sampled_from([torch.int32, torch.int64]))
def test_it_is_the_root_of_the_smallest_square(
    case: tuple[Tensor, Tensor, tuple[int, int, int]], dtype: torch.dtype
) -> None:
    context, predict, grid = case
    found = mask_distance(context.to(dtype), predict.to(dtype), grid)
    exact = reference.mask_distance(context, predict, grid)
    assert found.dtype == torch.float32
    assert torch.equal(found.double().square().round(), exact.square().round())
    # The square is exact; its float32 root is a unit in the last place off on some machines.
    torch.testing.assert_close(found.double(), exact, rtol=1.3e-7, atol=0.0)


def test_a_whole_video_grid_in_three_axes() -> None:
    grid = (3, 4, 5)
    # One predicted token, at (t, h, w) = (1, 2, 3).
    found = mask_distance(torch.arange(60)[None], torch.tensor([[1 * 20 + 2 * 5 + 3]]), grid)
    t, h, w = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    square = (t - 1) ** 2 + (h - 2) ** 2 + (w - 3) ** 2
    assert torch.equal(found.square().round(), square.float().view(1, -1))


@pytest.mark.parametrize(
    ("context", "predict", "words"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.int64), "context: expected int32"),
        (torch.zeros(3, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64), "context"),
        (torch.tensor([[8]]), torch.tensor([[0]]), r"context: indices 8\.\.8 leave the grid"),
        (torch.tensor([[0]]), torch.tensor([[-1]]), r"predict: indices -1\.\.-1 leave"),
        (torch.tensor([[0], [1]]), torch.tensor([[0]]), "context has 2 clips, predict 1"),
        (torch.tensor([[0]]), torch.zeros(1, 0, dtype=torch.int64), "at least one predicted token"),
    ],
)
def test_bad_input_is_named(context: Tensor, predict: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        mask_distance(context, predict, (2, 2, 2))
