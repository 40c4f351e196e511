"""What this process and those it started may use, and use: cores, CPU time and memory."""

import os
from collections.abc import Collection


def usable_cores() -> int:
    """Logical cores that this process may run on; all, where the system does not tell (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_seconds() -> float:
    """CPU time of this process and of its living children, theirs included, so far."""
    import psutil

    this = psutil.Process()
    used = 0.0
    for process in (this, *this.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        used += times.user + times.system
    return used


def children() -> set[int]:
    """Process ids of the living children, theirs included."""
    import psutil

    return {process.pid for process in psutil.Process().children(recursive=True)}


def own_bytes(pids: Collection[int]) -> int:
    """Memory that would be free if these processes ended; shared pages do not count."""
    import psutil

    held = 0
    for pid in pids:
        try:
            held += int(psutil.Process(pid).memory_full_info().uss)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return held
