"""Bytes per rank of each layout, against the layouts written out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastjepa.observe.states import LAYOUTS, Layout, state_bytes

RANKS = (1, 2, 4, 128)
# Divisible by all of RANKS, so that no shard is padded.
ENCODER, PREDICTOR = 128 * 1001, 128 * 77


def per_parameter(
    layout: Layout, ranks: int, value_bytes: int = 2, *, offload: bool = False
) -> tuple[float, float]:
    """Bytes for each parameter of the encoder and of the predictor, autocast's copies aside."""
    known = {"ranks": ranks, "value_bytes": value_bytes, "offload": offload}
    encoder = state_bytes(ENCODER, 0, layout=layout, **known)  # type: ignore[arg-type]
    predictor = state_bytes(0, PREDICTOR, layout=layout, **known)  # type: ignore[arg-type]
    return (encoder.total - encoder.casts) / ENCODER, (
        predictor.total - predictor.casts
    ) / PREDICTOR


@pytest.mark.parametrize("ranks", RANKS)
def test_bytes_of_an_encoders_and_a_predictors_parameter(ranks: int) -> None:
    """The encoder has an EMA of 4 bytes and a bf16 target of 2 more than the predictor."""
    assert per_parameter("torch", ranks) == (20, 16)
    assert per_parameter("zero0", ranks) == (22, 16)
    assert per_parameter("zero1", ranks) == pytest.approx((6 + 16 / ranks, 4 + 12 / ranks))
    assert per_parameter("zero2", ranks) == pytest.approx((4 + 18 / ranks, 2 + 14 / ranks))
    assert per_parameter("zero3", ranks) == pytest.approx((22 / ranks, 16 / ranks))


@given(
    st.sampled_from(LAYOUTS), st.integers(0, 10**10), st.integers(0, 10**9), st.integers(1, 4096)
)
def test_parts_add_up_over_encoder_predictor_and_ranks(
    layout: Layout, encoder: int, predictor: int, ranks: int
) -> None:
    both = state_bytes(encoder, predictor, layout=layout, ranks=ranks)
    alone = state_bytes(encoder, 0, layout=layout, ranks=ranks).total
    other = state_bytes(0, predictor, layout=layout, ranks=ranks).total
    assert abs(both.total - alone - other) <= 6
    one = state_bytes(encoder, predictor, layout=layout).total
    assert one <= ranks * both.total
    assert both.total <= one + 6


def test_autocast_adds_copies_of_what_is_trained_to_float32_weights_alone() -> None:
    """And not where blocks by hand make them anew for the backward."""
    assert state_bytes(10, 3, layout="torch", by_hand=False).casts == 26
    assert state_bytes(10, 3, layout="torch").casts == 0
    assert state_bytes(10, 3, layout="torch", value_bytes=4, by_hand=False).casts == 0
    assert state_bytes(10, 3, layout="zero2", by_hand=False).casts == 0


def test_float32_doubles_what_zero_works_with() -> None:
    assert per_parameter("zero1", 4, 4) == (12 + 16 / 4, 8 + 12 / 4)
    assert per_parameter("zero3", 4, 4) == (28 / 4, 20 / 4)


def test_offloading_leaves_the_working_values_on_the_gpu() -> None:
    assert per_parameter("zero2", 4, offload=True) == (4 + 2 / 4, 2 + 2 / 4)
    moved = state_bytes(ENCODER, 0, layout="zero2", ranks=4, offload=True)
    assert moved.master == moved.moments == moved.ema == 0
    assert moved.host == ENCODER * 16 / 4
    assert moved.total + moved.host == state_bytes(ENCODER, 0, layout="zero2", ranks=4).total


def test_no_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="ranks: expected at least 1, got 0"):
        state_bytes(10, 3, layout="zero1", ranks=0)
