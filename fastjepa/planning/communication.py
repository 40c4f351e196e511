"""Bytes that a rank sends in a step, and how long they take, from plain numbers.

A ring over R ranks sends (R - 1) / R of a tensor from every rank in a reduce-scatter or an
all-gather, and twice that in an all-reduce. All that is sent is bf16. docs/planning.md says what
each ZeRO stage sends, and when.
"""

from dataclasses import dataclass

from fastjepa.observe.states import Layout

_BF16 = 2


@dataclass(frozen=True)
class Traffic:
    """Bytes one rank sends in an optimizer step: gradients, trained weights, the target's."""

    gradients: float
    weights: float
    target: float

    @property
    def total(self) -> float:
        return self.gradients + self.weights + self.target


def step_traffic(
    encoder: int, predictor: int, *, layout: Layout, ranks: int, passes: float
) -> Traffic:
    """What a step of `passes` micro-batches sends, for so many parameters.

    Stage 0 all-reduces gradients. Stage 1 reduce-scatters them and all-gathers weights and target
    after the update. Stage 2 does so with the gradients of every micro-batch. Stage 3 gathers the
    weights for each forward and each backward, and the target for each of its forwards, instead.
    """
    ring = (ranks - 1) / ranks
    trained, followed = _BF16 * (encoder + predictor) * ring, _BF16 * encoder * ring
    if layout == "torch":
        return Traffic(0.0, 0.0, 0.0)
    if layout == "zero0":
        return Traffic(2 * trained, 0.0, 0.0)
    if layout == "zero1":
        return Traffic(trained, trained, followed)
    if layout == "zero2":
        return Traffic(passes * trained, trained, followed)
    return Traffic(passes * trained, 2 * passes * trained, passes * followed)


def ring_bandwidth(ranks: int, *, ranks_per_node: int, nvlink: float, network: float) -> float:
    """Bytes a second of the ring's slowest link: the network as soon as there are two nodes."""
    return nvlink if ranks <= ranks_per_node else min(nvlink, network)
