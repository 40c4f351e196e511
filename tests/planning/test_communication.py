"""Bytes on the wire, against a ring that is played through chunk by chunk."""

import pytest

from fastjepa.observe.states import LAYOUTS, Layout
from fastjepa.planning.communication import ring_bandwidth, step_traffic

ENCODER, PREDICTOR, RANKS = 8_000, 1_600, 4


def ring_steps(values: int) -> int:
    """Bytes that a rank sends in a ring reduce-scatter or all-gather of `values` bf16 numbers: in
    each of R - 1 rounds one R-th of them goes to the neighbour."""
    return sum(2 * values // RANKS for _ in range(RANKS - 1))


@pytest.mark.parametrize(
    ("layout", "gradients", "weights", "target"),
    [("torch", 0, 0, 0), ("zero0", 2, 0, 0), ("zero1", 2, 1, 1), ("zero2", 2, 1, 1),
     ("zero3", 1, 2, 1)],
)  # fmt: skip
def test_collectives_of_a_step_of_one_pass(
    layout: Layout, gradients: int, weights: int, target: int
) -> None:
    sent = step_traffic(ENCODER, PREDICTOR, layout=layout, ranks=RANKS, passes=1)
    trained = ring_steps(ENCODER + PREDICTOR)
    assert sent.gradients == gradients * trained
    assert sent.weights == weights * trained
    assert sent.target == target * ring_steps(ENCODER)
    assert sent.total == sent.gradients + sent.weights + sent.target


def test_only_stages_2_and_3_send_with_every_pass() -> None:
    def sent(layout: Layout, passes: float) -> float:
        return step_traffic(ENCODER, PREDICTOR, layout=layout, ranks=RANKS, passes=passes).total

    assert sent("zero0", 3) == sent("zero0", 1)
    assert sent("zero1", 3) == sent("zero1", 1)
    assert sent("zero2", 3) - sent("zero2", 1) == 2 * 2 * ring_steps(ENCODER + PREDICTOR)
    assert sent("zero3", 3) == 3 * sent("zero3", 1)


def test_float32_is_twice_as_much() -> None:
    half, gradients, all_of_it = (
        step_traffic(ENCODER, PREDICTOR, layout="zero2", ranks=RANKS, passes=1, **more)
        for more in ({}, {"gradient_bytes": 4}, {"gradient_bytes": 4, "value_bytes": 4})
    )
    assert gradients.gradients == 2 * half.gradients
    assert gradients.weights == half.weights
    assert all_of_it.total == 2 * half.total


def test_one_rank_sends_nothing() -> None:
    for layout in LAYOUTS:
        assert step_traffic(ENCODER, PREDICTOR, layout=layout, ranks=1, passes=2).total == 0


def test_a_second_node_makes_the_network_the_slowest_link() -> None:
    def link(ranks: int) -> float:
        return ring_bandwidth(ranks, ranks_per_node=8, nvlink=450e9, network=50e9)

    assert link(8) == 450e9
    assert link(9) == 50e9
