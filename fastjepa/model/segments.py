"""How a packed batch is cut: which rows belong to one sequence.

All mask groups of a micro-batch run through the blocks as one matrix of rows; only attention
needs to know where a sequence ends. A segment is `count` sequences of equal `length`, one after
the other.

Shapes: R rows, U rows that differ, B batch, K kept tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
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


def packed(parts: Sequence[Tensor]) -> Tensor:
    """Rows of some parts, one part behind the other; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


def num_rows(index_groups_BK: Sequence[Tensor]) -> int:
    """Packed rows of some groups of index sets [B, K]."""
    return sum(index.numel() for index in index_groups_BK)


@dataclass(frozen=True)
class SharedRow:
    """Sequences that end in copies of one row, which their packed matrix [U, ...] holds once, last.

    `segments` are those of the whole sequences; of each sequence in segment i the first `own[i]`
    rows are its own.
    """

    segments: tuple[Segment, ...]
    own: tuple[int, ...]

    def parts(self, x_U: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """The sequences of a segment, without a copy: own rows [count, own, ...], and the shared
        row for the rest."""
        starts = [0]
        for segment, own in zip(self.segments, self.own, strict=True):
            starts.append(starts[-1] + segment.count * own)
        segment, own = self.segments[number], self.own[number]
        mine = x_U[starts[number] : starts[number + 1]]
        rest = (segment.count, segment.length - own, *x_U.shape[1:])
        return mine.view(segment.count, own, *x_U.shape[1:]), x_U[-1].expand(rest)

    def spread(self, x_U: Tensor) -> Tensor:
        """Every row of every sequence: [R, ...]."""
        sequences = [torch.cat(self.parts(x_U, i), dim=1) for i in range(len(self.segments))]
        return packed([sequence.flatten(0, 1) for sequence in sequences])

    def collect(self, grad_R: Tensor) -> Tensor:
        """The transpose of `spread`: copies of the shared row add up. [R, ...] -> [U, ...]."""
        own, shared = [], grad_R.new_zeros(grad_R.shape[1:])
        for segment, count in zip(self.segments, self.own, strict=True):
            sequences = segment.rows(grad_R)
            own.append(sequences[:, :count].flatten(0, 1))
            shared += sequences[:, count:].sum((0, 1))
        return torch.cat([*own, shared[None]])
