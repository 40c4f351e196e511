"""Distances to the nearest predicted token: exact, whatever the grid, in kernel and twin."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastjepa_kernels import mask_distance, mask_distance_jagged
from fastjepa_kernels.mask_distance import reference
from fastjepa_kernels.mask_distance.op import _mask_distance

Grid = tuple[int, int, int]


@st.composite
def masks(draw: st.DrawFn) -> tuple[Tensor, Tensor, Grid]:
    grid = draw(st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)))
    tokens = grid[0] * grid[1] * grid[2]
    batch = draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    context, predict = draw(st.integers(1, tokens)), draw(st.integers(1, tokens))

    def choose(count: int) -> Tensor:
        rows = [torch.randperm(tokens, generator=generator)[:count] for _ in range(batch)]
        return torch.stack(rows)

    return choose(context), choose(predict), grid


@settings(max_examples=40, deadline=None)
@given(case=masks(), dtype=st.sampled_from([torch.int32, torch.int64]))
def test_it_is_the_root_of_the_smallest_square(
    case: tuple[Tensor, Tensor, Grid], dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    context, predict, grid = case
    found = mask_distance(
        context.to(device, dtype), predict.to(device, dtype), grid, backend=backend
    ).cpu()
    exact = reference.mask_distance(context, predict, grid)
    assert found.dtype == torch.float32
    assert torch.equal(found.double().square().round(), exact.square().round())
    # The square is exact; its float32 root is a unit in the last place off on some machines.
    torch.testing.assert_close(found.double(), exact, rtol=1.3e-7, atol=0.0)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_segments_of_any_lengths_behind_one_another(
    data: st.DataObject, backend: str, device: torch.device
) -> None:
    grid = (2, 9, 11)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    lengths = st.lists(st.tuples(st.integers(0, 150), st.integers(1, 90)), min_size=1, max_size=4)
    pairs = [
        tuple(torch.randperm(198, generator=generator)[:count] for count in counts)
        for counts in data.draw(lengths)
    ]
    context, predict = (torch.cat([pair[side] for pair in pairs]) for side in (0, 1))
    offsets = [torch.tensor([0, *(len(pair[side]) for pair in pairs)]).cumsum(0) for side in (0, 1)]
    most = max(len(pair[0]) for pair in pairs)
    found = mask_distance_jagged(
        context.to(device), predict.to(device), *(o.to(device) for o in offsets), most, grid,
        backend=backend,
    ).cpu()  # fmt: skip
    exact = [reference.mask_distance(c[None], p[None], grid).flatten() for c, p in pairs]
    torch.testing.assert_close(found.double(), torch.cat(exact), rtol=1.3e-7, atol=0.0)


def test_a_whole_video_grid_in_three_axes(
    backend: str, device: torch.device, called: Callable[[Any], Any]
) -> None:
    grid = (3, 4, 5)
    everything = torch.arange(60, device=device)[None]
    # One predicted token, at (t, h, w) = (1, 2, 3).
    place = torch.tensor([[1 * 20 + 2 * 5 + 3]], device=device)
    found = called(lambda c, p: mask_distance(c, p, grid, backend=backend))(everything, place)
    t, h, w = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    square = (t - 1) ** 2 + (h - 2) ** 2 + (w - 3) ** 2
    assert torch.equal(found.cpu().square().round(), square.float().view(1, -1))


def test_strided_indices(backend: str, device: torch.device) -> None:
    index = torch.arange(12, device=device).view(2, 6)
    context, predict = index[:, ::2], index[:, 1::3]
    assert not context.is_contiguous()
    found = mask_distance(context, predict, (1, 3, 4), backend=backend)
    copied = mask_distance(context.contiguous(), predict.contiguous(), (1, 3, 4), backend=backend)
    assert torch.equal(found, copied)


def test_no_context_token_has_no_distance(backend: str, device: torch.device) -> None:
    none = torch.zeros(2, 0, dtype=torch.int64, device=device)
    some = torch.zeros(2, 1, dtype=torch.int64, device=device)
    assert mask_distance(none, some, (1, 2, 2), backend=backend).shape == (2, 0)


def test_it_is_a_well_behaved_op(backend: str, device: torch.device) -> None:
    index = torch.arange(8, device=device)
    offset = torch.tensor([0, 5, 8], device=device)
    torch.library.opcheck(_mask_distance, (index, index, offset, offset, 5, [2, 2, 2], backend))


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


def test_a_segment_with_nothing_to_predict_is_refused() -> None:
    index, offset = torch.arange(4), torch.tensor([0, 2, 4])
    with pytest.raises(ValueError, match=r"predict_offset: .* by 1 to 4 a segment, got .* by 0"):
        mask_distance_jagged(index, index, offset, torch.tensor([0, 0, 4]), 2, (1, 2, 2))


def test_a_kernel_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    index = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="triton needs CUDA tensors, got cpu"):
        mask_distance(index, index, (1, 2, 2), backend="triton")
    with pytest.raises(ValueError, match="expected one of auto, triton, reference, got cuda"):
        mask_distance(index, index, (1, 2, 2), backend="cuda")  # type: ignore[arg-type]
