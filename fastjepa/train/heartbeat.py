"""Ranks that fall silent: a node cut off or frozen ends the others, which would wait for it.

    with heartbeat(store, rank=0, size=8, silence=30): ...

A rank whose process ends closes its connections, and the others hear of that at once. From a
machine that is gone nothing comes at all, and they would wait for engine.timeout. So every rank
counts up a number in the rendezvous' store, and looks at the others'. Seconds are counted in naps:
where the whole machine pauses, all ranks' clocks stand still.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

# Seconds between beats, and the word of a rank that has left in peace.
BEAT = 2.0
_LEFT = b"left"


class _Watch:
    """When each rank, and the store itself, was last heard of; in seconds of naps."""

    def __init__(self, size: int) -> None:
        self._clock = self._store = 0.0
        self._ranks = [0.0] * size
        self._last: list[bytes] = [b""] * size

    def nap(self, seconds: float) -> None:
        """Let time pass."""
        self._clock += seconds

    def hear(self, told: Sequence[bytes]) -> None:
        """Take over what the store has."""
        self._store = self._clock
        for rank, (before, now) in enumerate(zip(self._last, told, strict=True)):
            if now != before or now == _LEFT:
                self._ranks[rank] = self._clock
        self._last = list(told)

    def silent(self, seconds: float) -> list[int]:
        """Ranks of which the store has had nothing new for longer than this."""
        return [rank for rank, when in enumerate(self._ranks) if self._clock - when > seconds]

    def store_silent(self, seconds: float) -> bool:
        """Whether the store has not answered for longer than this."""
        return self._clock - self._store > seconds


@contextmanager
def heartbeat(store: Any, *, rank: int, size: int, silence: float) -> Iterator[None]:
    """End this process with a line and exit code 2 once another rank, or the store, has been silent
    for `silence` seconds. Does nothing where there is one rank.

    `store` is a torch.distributed store that all ranks share. Nobody counts until all have begun.
    """
    if size == 1:
        yield
        return
    own, watch, over = store.clone(), _Watch(size), threading.Event()
    keys = [f"heartbeat/{other}" for other in range(size)]
    own.set(keys[rank], "0")
    own.wait(keys)

    def beat() -> None:
        number = 0
        while not over.is_set():
            number += 1
            try:
                own.set(keys[rank], str(number))
                watch.hear(own.multi_get(keys))
            except RuntimeError:
                return  # the store is gone: the other thread counts its silence
            # Judged only where the store has just answered. A node frozen with its store seems
            # silent a beat before the store does.
            if silent := watch.silent(silence):
                _end(rank, size, silent, silence)
            over.wait(BEAT)

    def listen() -> None:
        while not over.wait(BEAT):
            watch.nap(BEAT)
            if watch.store_silent(silence):
                _end(rank, size, None, silence)

    threads = [threading.Thread(target=work, daemon=True) for work in (beat, listen)]
    for thread in threads:
        thread.start()
    try:
        yield
    except BaseException:
        # The others learn of it from their connections, or from this rank's silence.
        over.set()
        raise
    over.set()
    threads[0].join(timeout=silence)
    with suppress(RuntimeError):  # the store may have left with the rank that holds it
        own.set(keys[rank], _LEFT)


def _end(rank: int, size: int, silent: Sequence[int] | None, silence: float) -> None:
    """The main thread waits inside a collective for what will not come, so it cannot be asked.

    `silent` None: nothing is known of any rank, as the store does not answer.
    """
    if silent is None:
        who, speaks = "the node of the rendezvous", os.environ.get("LOCAL_RANK", "0") == "0"
    else:
        who = f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent))}"
        speaks = rank == min(set(range(size)) - set(silent))
    if speaks:
        where = f"rank {rank}: " if rank else ""
        print(
            f"{where}error: ranks: nothing was heard of {who} for {silence:g} s "
            "(engine.heartbeat); the last checkpoint stands, and the same command goes on from it",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    if silent is None and speaks and "TORCHELASTIC_RUN_ID" in os.environ:
        # torchrun would wait for the same store, deaf to signals, and could not start again anyway.
        os.kill(os.getppid(), signal.SIGKILL)
    os._exit(2)
