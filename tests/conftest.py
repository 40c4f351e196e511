"""How the tests run: Triton without a GPU, and what shares the machine.

Without a GPU, Triton's kernels run in its interpreter, which has to be asked for before anything
imports Triton.
"""

import importlib.util
import os
import time
from collections.abc import Generator
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import LoadFileScheduling

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

MANY_RANKS = ("tests/distributed/", "tests/launch/")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: "Producer") -> "LoadFileScheduling":
    """Files of tests go to whoever is free; those that start many ranks to one of them, one after
    the other, so that no two of these wait for the same few cores."""
    from xdist.scheduler import LoadFileScheduling

    class OneOfManyRanks(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "many ranks" if nodeid.startswith(MANY_RANKS) else super()._split_scope(nodeid)

    return OneOfManyRanks(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    call: pytest.CallInfo[None],
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a failed test started and left ends with it, or it would slow down all that follow."""
    report = yield
    if report.failed and importlib.util.find_spec("psutil"):
        import psutil

        from .processes import end

        # By the clock that dates processes, whose ticks are rounded down.
        now = psutil.boot_time() + time.clock_gettime(time.CLOCK_BOOTTIME)
        began = now - (time.time() - call.start) - 0.02
        end([child for child in psutil.Process().children() if child.create_time() >= began])
    return report
