"""How a packed batch is cut: which rows belong to one sequence.

All mask groups of a micro-batch run through the blocks as one matrix of rows; only attention
needs to know where a sequence ends. A segment is `count` sequences of equal `length`, one after
the other.

Shapes: R rows, B batch, K kept tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """`count` sequences of `length` tokens: rows `start` to `stop` of the packed matrix."""

    start: int
    count: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.count * self.length

    def rows(self, x_R: Tensor) -> Tensor:
        """The segment's rows as sequences: [R, ...] -> view [count, length, ...]."""
        return x_R[self.start : self.stop].view(self.count, self.length, *x_R.shape[1:])


def segments_of(shapes: Sequence[tuple[int, int]]) -> tuple[Segment, ...]:
    """Segments of (count, length) pairs laid out one behind the other."""

    def place() -> Iterator[Segment]:
        start = 0
        for count, length in shapes:
            yield Segment(start, count, length)
            start += count * length

    return tuple(place())
