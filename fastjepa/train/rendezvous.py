"""A store that no earlier start has written to, where a launcher's is used again.

torchrun keeps one store over all its restarts (PyTorch 2.13), and in it the addresses of ranks that
are gone: gloo then connects to nobody. So the ranks agree on a prefix: the first one names it, the
others sign it, and the first one says that it has seen exactly these signatures. A signature is new
with each process, so what an earlier start has left behind fits nobody.
"""

import os
import time
from datetime import timedelta
from typing import Any
from uuid import uuid4

from torch import distributed as dist

_PAUSE = 0.1


def own_store(rank: int, size: int, *, timeout: float) -> Any:
    """The launcher's store under a prefix that is this start's own; None where there is no such
    store, and the first rank makes one.

    Raises torch.distributed's DistError when not all ranks come within `timeout` seconds.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        return None
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
        wait_for_workers=False, timeout=timedelta(seconds=timeout),
    )  # fmt: skip
    prefix = agreed_prefix(store, rank, size, timeout=timeout)
    return dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]


def agreed_prefix(store: Any, rank: int, size: int, *, timeout: float) -> str:
    """The same new word on all ranks, which all call it. Raises DistError as `own_store` does."""
    own, until = uuid4().hex, time.monotonic() + timeout
    if rank == 0:
        signed = [f"start/{own}/{other}" for other in range(1, size)]
        store.set("start", own)
        if signed:
            store.wait(signed, timedelta(seconds=timeout))
        store.set(f"start/{own}", b" ".join(store.get(key) for key in signed))
        return own
    while time.monotonic() < until:
        word = store.get("start").decode()
        store.set(f"start/{word}/{rank}", own)
        seen = store.get(f"start/{word}") if store.check([f"start/{word}"]) else b""
        if own.encode() in seen.split():
            return str(word)
        time.sleep(_PAUSE)
    raise dist.DistStoreError(f"rank 0 has not seen rank {rank} within {timeout:g} s")
