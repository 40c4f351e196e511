"""The rotary table: which channels turn by which angle, for every grid."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastjepa.model.positions import rotary_table, turn_tiled

LIKE = torch.zeros((), dtype=torch.float64)


def angle(grid: tuple[int, int, int], head_dim: int, token: int, pair: int) -> float:
    """The specification's angle, written out for one token and one channel pair."""
    _, height, width = grid
    place = (token // (height * width), token // width % height, token % width)
    pairs = (head_dim // 3) // 2
    if pair >= 3 * pairs:
        return 0.0
    axis, j = divmod(pair, pairs)
    position = float(place[axis])
    if axis > 0 and grid[axis] > 1:
        position *= 15 / (grid[axis] - 1)
    return position * 10_000.0 ** (-j / pairs)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6)),
    st.sampled_from([6, 8, 12, 16, 32, 64]),
)
def test_it_is_the_specification_for_any_grid(grid: tuple[int, int, int], head_dim: int) -> None:
    table = rotary_table(grid, head_dim, like=LIKE)
    tokens = grid[0] * grid[1] * grid[2]
    assert table.shape == (tokens, head_dim // 2, 2)
    assert table.isfinite().all()
    expected = torch.tensor(
        [[angle(grid, head_dim, n, c) for c in range(head_dim // 2)] for n in range(tokens)],
        dtype=torch.float64,
    )
    torch.testing.assert_close(table[..., 0], expected.cos(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(table[..., 1], expected.sin(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("head_dim", "turned"), [(16, 12), (32, 30), (64, 60)])
def test_the_channels_that_no_axis_has_stay(head_dim: int, turned: int) -> None:
    last = rotary_table((4, 9, 9), head_dim, like=LIKE)[-1]
    assert torch.equal(last[turned // 2 :, 0], torch.ones(head_dim // 2 - turned // 2).double())
    assert not last[turned // 2 :, 1].any()
    assert (last[: turned // 2, 1] != 0).all()


@pytest.mark.parametrize("side", [5, 16, 24, 32])
def test_height_and_width_always_span_the_pretraining_grid(side: int) -> None:
    """384 px, 24 tokens a side, spans 0 to 15 as 256 px does."""
    table = rotary_table((1, side, side), 32, like=LIKE)
    corner = table[-1]
    for first_pair in (5, 10):
        assert corner[first_pair, 0].item() == pytest.approx(math.cos(15.0), abs=1e-12)
        assert corner[first_pair, 1].item() == pytest.approx(math.sin(15.0), abs=1e-12)


def test_at_256_px_interpolation_changes_nothing_and_time_is_never_scaled() -> None:
    scaled = rotary_table((8, 16, 16), 64, like=LIKE)
    plain = rotary_table((8, 16, 16), 64, like=LIKE, interpolate=False)
    torch.testing.assert_close(scaled, plain)
    long = rotary_table((32, 2, 2), 64, like=LIKE)
    assert long[-1, 0, 0].item() == pytest.approx(math.cos(31.0), abs=1e-12)


def test_without_interpolation_a_position_is_an_index() -> None:
    table = rotary_table((1, 1, 24), 32, like=LIKE, interpolate=False)
    assert table[23, 10, 0].item() == pytest.approx(math.cos(23.0), abs=1e-12)


def test_it_has_the_precision_of_its_use() -> None:
    assert rotary_table((1, 2, 2), 8, like=torch.zeros(())).dtype == torch.float32
    assert (
        rotary_table((1, 2, 2), 8, like=torch.zeros((), dtype=torch.bfloat16)).dtype
        == torch.float32
    )
    assert rotary_table((1, 2, 2), 8, like=LIKE).dtype == torch.float64


@pytest.mark.parametrize("head_dim", [4, 5, 7, 33])
def test_heads_that_cannot_be_turned_are_refused(head_dim: int) -> None:
    with pytest.raises(ValueError, match=f"head width: expected an even number.*got {head_dim}"):
        rotary_table((1, 2, 2), head_dim, like=LIKE)


@settings(max_examples=30, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
    st.sampled_from([6, 8, 16, 32, 64, 80]),
    st.booleans(),
)
def test_the_tiled_layout_repeats_the_list_of_frequencies(
    grid: tuple[int, int, int], head_dim: int, interpolate: bool
) -> None:
    """V-JEPA 2: channel c of an axis has frequency c mod m/2, where 2.1 has c div 2."""
    table = rotary_table(grid, head_dim, like=LIKE, interpolate=interpolate, rope="tiled")
    assert table.shape == (math.prod(grid), head_dim, 2)
    pairs = (head_dim // 3) // 2
    wide = rotary_table(grid, head_dim, like=LIKE, interpolate=interpolate)
    for axis in range(3):
        found = table[:, 2 * pairs * axis : 2 * pairs * (axis + 1)].unflatten(1, (2, pairs))
        expected = wide[:, pairs * axis : pairs * (axis + 1)]
        assert torch.equal(found[:, 0], expected)
        assert torch.equal(found[:, 1], expected)
    assert torch.equal(
        table[:, 6 * pairs :, 0], torch.ones(len(table), head_dim - 6 * pairs).double()
    )
    assert not table[:, 6 * pairs :, 1].any()


def test_the_tiled_turn_mixes_neighbours_each_by_its_own_angle() -> None:
    torch.manual_seed(0)
    grid, heads, channels = (2, 3, 2), 2, 16
    table = rotary_table(grid, channels, like=LIKE, rope="tiled")
    qkv = torch.randn(3, 12, 3, heads, channels, dtype=torch.float64, requires_grad=True)
    out = turn_tiled(qkv, table[None])
    for n, h, c in ((0, 0, 0), (5, 1, 3), (11, 0, 8), (7, 1, 12), (7, 1, 15)):
        cos, sin = table[n, c].tolist()
        beside = -qkv[0, n, 0, h, c + 1] if c % 2 == 0 else qkv[0, n, 0, h, c - 1]
        expected = qkv[0, n, 0, h, c] * cos + beside * sin
        assert out[0, n, 0, h, c].item() == pytest.approx(expected.item(), abs=1e-12)
    assert torch.equal(out[:, :, 2], qkv[:, :, 2])
    assert torch.autograd.gradcheck(
        lambda x: turn_tiled(x, table[None]), qkv[:1].detach().requires_grad_()
    )
