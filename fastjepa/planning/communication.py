"""Bytes that a rank sends in a step, and how long they take, from plain numbers.

A ring over R ranks sends (R - 1) / R of a tensor from every rank in a reduce-scatter or an
all-gather, and twice that in an all-reduce. docs/planning.md says what each ZeRO stage sends, and
when; a test of the engine on two ranks counts it.
"""

from dataclasses import dataclass

from fastjepa.observe.states import Layout


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
    encoder: int,
    predictor: int,
    *,
    layout: Layout,
    ranks: int,
    passes: float,
    value_bytes: int = 2,
    gradient_bytes: int = 2,
) -> Traffic:
    """What a step of `passes` micro-batches sends, for so many parameters.

    Stage 0 all-reduces gradients. Stage 1 does, too, and all-gathers weights and target after the
    update. Stage 2 all-reduces the gradients of every micro-batch. Stage 3 reduce-scatters these,
    and gathers the weights for each forward and each backward and the target for each of its
    forwards instead. `value_bytes` are a weight's, `gradient_bytes` a gradient's on its way.
    """
    ring = (ranks - 1) / ranks
    gradients = gradient_bytes * (encoder + predictor) * ring
    weights, target = value_bytes * (encoder + predictor) * ring, value_bytes * encoder * ring
    if layout == "torch":
        return Traffic(0.0, 0.0, 0.0)
    if layout == "zero0":
        return Traffic(2 * gradients, 0.0, 0.0)
    if layout == "zero1":
        return Traffic(2 * gradients, weights, target)
    if layout == "zero2":
        return Traffic(2 * passes * gradients, weights, target)
    return Traffic(passes * gradients, 2 * passes * weights, passes * target)


def ring_bandwidth(ranks: int, *, ranks_per_node: int, nvlink: float, network: float) -> float:
    """Bytes a second of the ring's slowest link: the network as soon as there are two nodes."""
    return nvlink if ranks <= ranks_per_node else min(nvlink, network)
