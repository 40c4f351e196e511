"""Freed memory stays with a process that asks for it."""

import os
import platform
import subprocess
import sys

import pytest

# The heap's end before some blocks are taken, with them, and once they are free.
PROGRAM = """
import ctypes, sys
from fastjepa.freed_memory import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
before = libc.sbrk(0)
blocks = [libc.malloc(100_000) for _ in range(300)]
full = libc.sbrk(0)
for block in reversed(blocks):
    libc.free(ctypes.c_void_p(block))
print(kept, full - before, libc.sbrk(0) - before)
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")


def run(way: str, **environment: str) -> tuple[bool, int, int]:
    """Whether it was said to be kept; by how much the heap had grown, and had in the end."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, way],
        capture_output=True, text=True, check=True, env={**os.environ, **environment},
    )  # fmt: skip
    kept, full, left = done.stdout.split()
    return kept == "True", int(full), int(left)


def test_what_was_freed_stays() -> None:
    kept, full, left = run("keep")
    assert kept
    assert left == full >= 20 << 20
    kept, full, left = run("no")
    assert left < full / 10


def test_settings_of_the_environment_win() -> None:
    kept, full, left = run("keep", MALLOC_TRIM_THRESHOLD_="100000")
    assert not kept
    assert left < full / 10
