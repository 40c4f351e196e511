"""Schedules at their corners."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastjepa.optim.schedules import Shape, ema_momentum, learning_rate, weight_decay


def lr(step: int, shape: Shape = "cosine", warmup: int = 10, horizon: int = 100) -> float:
    return learning_rate(
        step, shape=shape, start=1e-4, peak=6e-4, final=1e-6, warmup=warmup, horizon=horizon
    )


def test_warm_up_is_linear_from_start_to_peak() -> None:
    # Step s has the schedule's value at s + 1, as the reference steps before it trains.
    assert lr(0) == pytest.approx(1e-4 + 5e-4 * 0.1)
    assert lr(4) == pytest.approx(1e-4 + 5e-4 * 0.5)
    assert lr(8) == pytest.approx(1e-4 + 5e-4 * 0.9)
    assert lr(9) == pytest.approx(6e-4)


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_it_ends_at_the_final_rate_and_stays(shape: Shape) -> None:
    assert lr(99, shape) == pytest.approx(1e-6)
    assert lr(10**6, shape) == pytest.approx(1e-6)
    middle = lr(54, shape)
    assert middle == pytest.approx((6e-4 + 1e-6) / 2)


def test_constant_stays_at_the_peak() -> None:
    assert lr(9, "constant") == lr(99, "constant") == lr(10**6, "constant") == 6e-4


def test_cosine_and_linear_differ_between_their_ends() -> None:
    assert lr(30, "cosine") > lr(30, "linear")
    assert lr(80, "cosine") < lr(80, "linear")


def test_no_warm_up_and_horizons_of_nothing() -> None:
    assert lr(0, warmup=0) < 6e-4
    assert lr(0, "constant", warmup=0) == 6e-4
    assert lr(0, warmup=1, horizon=1) == pytest.approx(6e-4)
    assert lr(1, warmup=1, horizon=1) == pytest.approx(1e-6)


@given(st.integers(0, 500), st.sampled_from(["constant", "cosine", "linear"]))
def test_the_rate_never_leaves_its_bounds_and_falls_after_the_warm_up(
    step: int, shape: Shape
) -> None:
    assert 1e-6 <= lr(step, shape) <= 6e-4 + 1e-18
    if step >= 9:
        assert lr(step + 1, shape) <= lr(step, shape)


def test_weight_decay_is_constant_or_a_cosine() -> None:
    assert weight_decay(50, start=0.04, final=None, horizon=100) == 0.04
    assert weight_decay(49, start=0.04, final=0.4, horizon=100) == pytest.approx(0.22)
    assert weight_decay(99, start=0.04, final=0.4, horizon=100) == pytest.approx(0.4)
    assert weight_decay(10**6, start=0.04, final=0.4, horizon=100) == pytest.approx(0.4)
    assert weight_decay(0, start=0.04, final=0.4, horizon=0) == pytest.approx(0.4)


def test_momentum_is_constant_or_linear() -> None:
    assert ema_momentum(7, start=0.99925, final=None, horizon=100) == 0.99925
    assert ema_momentum(0, start=0.9, final=1.0, horizon=100) == 0.9
    assert ema_momentum(50, start=0.9, final=1.0, horizon=100) == pytest.approx(0.95)
    assert ema_momentum(100, start=0.9, final=1.0, horizon=100) == 1.0
    assert ema_momentum(10**6, start=0.9, final=1.0, horizon=100) == 1.0
