"""What ranks tell of a logged step, put together into one row."""

import math

import pytest

from fastjepa.train.report import Told, over_ranks


def told(
    weight: float, metrics: dict[str, float], *, wait: float = 0.0, flops: float = 4.0,
    seconds: float = 2.0, memory: float = 1.0, peak: float | None = 8.0,
) -> Told:  # fmt: skip
    rates = {
        "clips_per_second": 3.0, "tokens_per_second": 30.0, "flops_per_second": flops / seconds,
        "step_seconds": seconds, "step_flops": flops, "data_wait": wait,
    }  # fmt: skip
    return Told(weight, metrics, rates, memory, peak)


def test_a_metric_is_the_mean_over_the_ranks_that_have_it_by_weight() -> None:
    row = over_ranks(
        [
            told(3.0, {"loss_predict": 1.0, "loss/image": 5.0}),
            told(1.0, {"loss_predict": 2.0, "loss/video": 7.0}),
            told(1.0, {"loss_predict": 4.0, "loss/video": 9.0}),
        ]
    )
    assert row["loss_predict"] == pytest.approx((3 * 1 + 2 + 4) / 5)
    assert (row["loss/image"], row["loss/video"]) == (5.0, 8.0)


def test_rates_add_up_and_of_waits_and_memory_the_largest_counts() -> None:
    row = over_ranks(
        [
            told(1.0, {}, wait=0.1, flops=4.0, memory=2.0),
            told(1.0, {}, wait=0.4, flops=5.0, memory=1.0, seconds=2.5),
        ]
    )
    assert row["clips_per_second"] == 6.0
    assert row["flops_per_second"] == 4.0
    assert row["mfu"] == 4.0 / 16.0
    assert (row["data_wait"], row["slowest_rank"], row["step_seconds"]) == (0.4, 1, 2.5)
    assert row["memory_gib"] == 2.0
    assert row["work_spread"] == pytest.approx(0.25)


def test_one_rank_is_told_as_it_is() -> None:
    row = over_ranks([told(1.0, {"loss": math.nan}, peak=None)])
    assert math.isnan(row["loss"])
    assert row["flops_per_second"] == 2.0
    assert not {"mfu", "slowest_rank", "work_spread"} & row.keys()


def test_before_a_step_was_timed_there_are_no_rates() -> None:
    row = over_ranks([Told(1.0, {"loss": 1.0}, {}, 0.5, None)])
    assert row == {"loss": 1.0, "memory_gib": 0.5}
