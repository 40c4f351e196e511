"""The processes that train together: who this one is, and the small things they tell each other.

    with join(device, timeout=600) as ranks: ...

Launchers (`fastjepa train --nproc`, torchrun, deepspeed, srun) give each process its place in the
environment: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. Without them there is one rank.
"""

import atexit
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from fastjepa.train.heartbeat import heartbeat
from fastjepa.train.rendezvous import own_store

T = TypeVar("T")


class RanksError(ValueError):
    """Every rank raises it, so that the first one alone need print it."""


class LostRankError(ValueError):
    """Another rank did not come, or went away; those that are left raise it."""


# What gloo says when a peer is gone, in errors that have no type of their own.
_GONE = ("closed by peer", "reset by peer", "Broken pipe", "timed out", "Timed out", "timeout")


@dataclass(frozen=True)
class Ranks:
    """This process's `rank` of `size`. With one rank, and with no process group, nothing is sent.

    All ranks must call the same methods in the same order.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this rank writes metrics, checkpoints and the console."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The ranks' mean of a tensor on the training device; NaN if any rank's is."""
        if self.size == 1:
            return values
        values = values / self.size
        dist.all_reduce(values)
        return values

    def any(self, flag: Tensor) -> Tensor:
        """A 0-d float32 flag of 0 or 1 on the training device: 1 if any rank's is."""
        if self.size > 1:
            flag = flag.clone()
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return flag

    def any_on_host(self, flag: bool) -> bool:
        """Whether any rank's flag is set, told through the hosts: no rank waits for its device."""
        if self.size == 1:
            return flag
        return bool(self.any(torch.tensor(float(flag))))

    def share(self, tensors: Iterable[Tensor]) -> None:
        """The first rank's values into everyone's tensors."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank; it has to be picklable."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def together(self, make: Callable[[], T]) -> T:
        """What `make`, in which nothing is sent, gives this rank.

        Where it raises ValueError or OSError on any rank, all of them raise RanksError with the
        first one's message; one rank alone raises what it raises.
        """
        if self.size == 1:
            return make()
        made: list[T] = []
        told = None
        try:
            made.append(make())
        except (ValueError, OSError) as error:
            told = str(error)
        for rank, message in enumerate(self.gather(told)):
            if message is not None:
                raise RanksError(f"rank {rank}: {message}" if rank else message)
        return made[0]

    def check_same(self, facts: Mapping[str, object]) -> None:
        """Raises RanksError on every rank, naming the first fact that is not the same on all."""
        told = self.gather(dict(facts))
        for rank, other in enumerate(told):
            for name in told[0] | other:
                first, here = told[0].get(name, "absent"), other.get(name, "absent")
                if first != here:
                    raise RanksError(
                        f"ranks: {name} is {first} on rank 0 and {here} on rank {rank}; "
                        "expected the same on all"
                    )


ALONE = Ranks()


@contextmanager
def join(
    device: torch.device, *, timeout: float, silence: float = 30.0, alone: bool = False
) -> Iterator[Ranks]:
    """The ranks that the launcher started, joined; they part at the end of the block.

    `timeout` in seconds is how long a rank waits for another, at the start and in a step; a rank
    of which nothing at all is heard for `silence` seconds ends the others at once. With `alone` a
    process group is made for one rank too (DeepSpeed wants one). Raises LostRankError when
    the ranks do not meet in time or one goes away, ValueError for an environment that is none.
    """
    size = _number("WORLD_SIZE", 1)
    ranks = Ranks(_number("RANK", 0), size)
    if not 0 <= ranks.rank < size:
        raise ValueError(f"RANK is {ranks.rank}, expected 0 to WORLD_SIZE - 1 = {size - 1}")
    if size == 1 and not alone:
        yield ranks
        return
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(_number("LOCAL_RANK", 0))
        backend = "cpu:gloo,cuda:nccl"
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        own = own_store(ranks.rank, size, timeout=timeout) if size > 1 else dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(
            backend, rank=ranks.rank, world_size=size, timeout=timedelta(seconds=timeout), store=own
        )
    except (RuntimeError, ValueError) as error:
        raise LostRankError(
            f"ranks: {size} ranks did not meet at {where} within {timeout:g} s (engine.timeout): "
            f"{_first_line(error)}"
        ) from error
    store = dist.distributed_c10d._get_default_store()
    try:
        with heartbeat(store, rank=ranks.rank, size=size, silence=silence):
            yield ranks
    except RuntimeError as error:
        if size == 1 or not any(word in str(error) for word in _GONE):
            raise
        raise LostRankError(
            "ranks: another rank went away, or did not answer within "
            f"{timeout:g} s (engine.timeout): {_first_line(error)}; "
            "the last checkpoint stands, and the same command goes on from it"
        ) from error
    finally:
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End the process with this exit code, its exit functions run, and Python not taken down.

    A thread of gloo's may hold the tensors of the last collective still, and to let go of one it
    waits for Python: where that is being taken down, it aborts the process, and a run that is
    complete seems to have failed (pytorch/pytorch#179291). To destroy the groups would end these
    threads, but DeepSpeed does not let go of its.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody listens any more
            stream.flush()
    os._exit(code)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} is {text!r} in the environment, expected a number") from None
