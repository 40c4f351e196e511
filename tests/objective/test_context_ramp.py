"""Lambda over a run."""

import pytest

from fastjepa.objective.context_ramp import context_weight


def test_without_a_ramp_it_is_constant() -> None:
    assert [context_weight(step, 0.5, None) for step in (0, 1, 10**6)] == [0.5] * 3


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.0), (14_999, 0.0), (15_000, 0.0), (18_000, 0.1), (22_500, 0.25), (29_999, 0.5),
     (30_000, 0.5), (135_000, 0.5)],
)  # fmt: skip
def test_the_released_ramp(step: int, expected: float) -> None:
    """0 up to step 15,000, linear to full at 30,000, then constant."""
    assert context_weight(step, 0.5, (15_000, 30_000)) == pytest.approx(expected, abs=5e-5)


def test_corners() -> None:
    assert context_weight(0, 0.5, (0, 10)) == 0.0
    assert context_weight(5, 0.5, (0, 10)) == 0.25
    assert context_weight(10, 0.5, (0, 10)) == 0.5
    # A ramp of no length is a jump.
    assert context_weight(4, 0.5, (5, 5)) == 0.0
    assert context_weight(5, 0.5, (5, 5)) == 0.5
    assert context_weight(0, 0.5, (0, 0)) == 0.5
    assert context_weight(7, 0.0, (0, 10)) == 0.0
