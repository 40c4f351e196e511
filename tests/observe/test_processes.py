"""Cores that a process may use, and the time that it and its children used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastjepa.observe.processes import children, cpu_seconds, usable_cores

ROOT = Path(__file__).parents[2]
PINNED = """
import os
from fastjepa.observe.processes import usable_cores
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
print(usable_cores())
"""
BUSY = """
import sys, time
while time.process_time() < 0.4: pass
print("done", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system pins no processes")
def test_a_pinned_process_has_the_cores_that_it_is_pinned_to() -> None:
    run = subprocess.run(
        [sys.executable, "-c", PINNED], cwd=ROOT, capture_output=True, text=True, timeout=120,
        check=True,
    )  # fmt: skip
    assert run.stdout == "1\n"


def test_where_the_system_does_not_tell_all_cores_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert usable_cores() == os.cpu_count()


def test_a_childs_time_counts_while_it_lives() -> None:
    before, own = cpu_seconds(), children()
    child = subprocess.Popen(
        [sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "done\n"
    assert children() - own == {child.pid}
    # The system tells in ticks of 10 ms, rounded down for each process and each kind of time.
    assert cpu_seconds() - before >= 0.3
    child.communicate()
    assert children() == own
