"""Of ranks found ended together, the one that is to blame."""

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from fastjepa.launch import GRACE, first_to_fail


def failures(*told: tuple[int, int]) -> dict[int, ProcessFailure]:
    """By rank, from exit codes (a signal's below zero) and times in seconds."""
    found = {}
    for rank, (code, when) in enumerate(told):
        found[rank] = ProcessFailure(local_rank=rank, pid=1, exitcode=code, error_file="")
        found[rank].timestamp = when
    return found


@pytest.mark.parametrize(
    ("told", "rank"),
    [
        pytest.param([(2, 5), (-9, 5)], 1, id="killed, and the other has heard of it"),
        pytest.param([(2, 5), (-9, 6), (-15, 7)], 1, id="killed, found a second later"),
        pytest.param([(-15, 6), (2, 5)], 1, id="an error, and the other was ended"),
        pytest.param([(-9, 5 + GRACE), (2, 5)], 1, id="an error, and the other would not end"),
        pytest.param([(1, 6), (2, 5)], 1, id="the earlier of two errors"),
        pytest.param([(2, 5), (2, 5)], 0, id="an error of all"),
        pytest.param([(-15, 5), (-15, 5)], 0, id="all ended by somebody else"),
    ],
)
def test_the_rank_that_the_others_failed_by(told: list[tuple[int, int]], rank: int) -> None:
    found = failures(*told)
    assert first_to_fail(found) == (rank, found[rank])
