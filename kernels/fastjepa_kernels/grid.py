"""Whole numbers of a launch. Triton has the same, for kernels too, at several microseconds a call:
a training step would ask for them some two thousand times."""


def cdiv(number: int, parts: int) -> int:
    """How many times `parts` it takes to hold `number`."""
    return -(-number // parts)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below `number`, which is at least 1."""
    return 1 << (number - 1).bit_length()
