"""Which streams a step holds, and how far each has come: pure functions of the step."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastjepa.train.plan import StepPlan


def plan(shares: dict[str, float], **changes: Any) -> StepPlan:
    values: dict[str, Any] = {
        "steps": 100, "accumulate": 1, "mix": "alternate", "shares": shares,
        "context_weights": dict.fromkeys(shares, 0.5), "ramp": None, "shape": "constant",
        "start_lr": 0.0, "peak_lr": 1e-3, "final_lr": 0.0, "warmup": 0, "horizon": 100,
        "start_decay": 0.0, "final_decay": None, "start_momentum": 0.9, "final_momentum": 0.9,
    }  # fmt: skip
    return StepPlan(**(values | changes))


def streams(one: StepPlan, steps: int) -> list[str]:
    return [draw.stream for step in range(steps) for draw in one.draws(step)]


mixtures = st.lists(st.integers(1, 20), min_size=1, max_size=4).map(
    lambda parts: {f"s{i}": part / sum(parts) for i, part in enumerate(parts)}
)


@given(
    mixtures, st.sampled_from(["accumulate", "alternate"]), st.integers(1, 3), st.integers(0, 60)
)
def test_position_counts_the_draws_of_the_steps_before(
    shares: dict[str, float], mix: str, accumulate: int, step: int
) -> None:
    one = plan(shares, mix=mix, accumulate=accumulate)
    drawn = Counter(streams(one, step))
    assert {name: one.position(step, name) for name in shares} == {n: drawn[n] for n in shares}


@given(
    mixtures, st.sampled_from(["accumulate", "alternate"]), st.integers(1, 3), st.integers(0, 10**6)
)
def test_the_weights_of_a_step_add_up_to_one(
    shares: dict[str, float], mix: str, accumulate: int, step: int
) -> None:
    draws = plan(shares, mix=mix, accumulate=accumulate).draws(step)
    assert sum(draw.share for draw in draws) == pytest.approx(1.0)
    held = Counter(draw.stream for draw in draws)
    assert set(held.values()) == {accumulate}
    assert len(held) == (len(shares) if mix == "accumulate" else 1)


@given(mixtures, st.integers(1, 10**7))
def test_alternating_streams_never_stray_from_their_shares(
    shares: dict[str, float], step: int
) -> None:
    one = plan(shares)
    for name, share in shares.items():
        assert abs(one.position(step, name) - step * share) < len(shares)


def test_images_come_every_so_many_steps() -> None:
    found = streams(plan({"video": 0.75, "image": 0.25}), 8)
    assert found == ["video", "video", "video", "image"] * 2


def test_three_streams_alternate() -> None:
    found = streams(plan({"video": 0.4, "video_64f": 0.1, "image": 0.5}), 20)
    assert Counter(found) == {"video": 8, "video_64f": 2, "image": 10}
    assert found[1::2] == ["image"] * 10
