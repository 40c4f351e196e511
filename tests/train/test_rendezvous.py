"""Ranks agree on a prefix of a store in which earlier starts have left theirs."""

import threading
import time
from datetime import timedelta

import pytest
from torch import distributed as dist

from fastjepa.train.rendezvous import agreed_prefix


def server() -> dist.TCPStore:
    return dist.TCPStore(
        "localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
    )


def start(store: dist.TCPStore, size: int, *, late: int | None = None) -> list[str]:
    """The ranks' prefixes, by rank, each rank with a connection of its own; `late` comes last."""
    found: dict[int, str] = {}

    def rank(number: int) -> None:
        found[number] = agreed_prefix(store.clone(), number, size, timeout=60)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(size)]
    for number in sorted(range(size), key=lambda number: number == late):
        if number == late:
            time.sleep(0.3)
        threads[number].start()
    for thread in threads:
        thread.join()
    return [found[number] for number in range(size)]


@pytest.mark.parametrize("late", [None, 0, 2])
def test_each_start_has_one_prefix_of_its_own(late: int | None) -> None:
    store, seen = server(), set()
    for _ in range(3):
        prefixes = start(store, 3, late=late)
        assert len(set(prefixes)) == 1
        seen.add(prefixes[0])
    assert len(seen) == 3


def test_a_rank_of_a_start_that_failed_is_not_waited_for() -> None:
    """The first rank came and went before the others signed."""
    store = server()
    with pytest.raises(dist.DistError):
        agreed_prefix(store.clone(), 0, 2, timeout=0.2)
    first, second = start(store, 2)
    assert first == second


def test_one_that_nobody_meets_gives_up() -> None:
    store = server()
    store.set("start", "left by an earlier start")
    with pytest.raises(dist.DistError, match=r"has not seen rank 1 within 0\.3 s"):
        agreed_prefix(store.clone(), 1, 2, timeout=0.3)
