"""Memory this process holds: resident now and at its highest, and the CUDA allocator's peak; and
how much it may hold."""

import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

_GIB = 2**30
_CONTROL_GROUP = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class MemoryReading:
    """GiB. `cuda_peak` is None when the device is not a CUDA one."""

    resident: float
    resident_peak: float
    cuda_peak: float | None

    @property
    def main(self) -> float:
        """The number to watch: the CUDA peak on a GPU, the resident peak on a CPU."""
        return self.resident_peak if self.cuda_peak is None else self.cuda_peak


def read_memory(device: torch.device | str = "cpu") -> MemoryReading:
    """Read this process's memory, without its workers and without waiting for the device."""
    import psutil

    device = torch.device(device)
    unit = 1 if sys.platform == "darwin" else 1024
    resident = psutil.Process().memory_info().rss / _GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB
    cuda = torch.cuda.max_memory_allocated(device) / _GIB if device.type == "cuda" else None
    return MemoryReading(resident, max(resident, peak), cuda)


@dataclass(frozen=True)
class MemoryLimit:
    """How many bytes a process may still take, and what sets the limit, in words before them."""

    bytes: int
    what: str


def memory_limit(device: torch.device) -> MemoryLimit:
    """A GPU's memory; on a CPU the least of the machine's, the control group's and the address
    space's, less what this process holds already. Ranks of one machine share it out."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return MemoryLimit(total, "the GPU has")
    import psutil

    own, ranks = psutil.Process().memory_info(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    limits = [MemoryLimit(psutil.virtual_memory().total // ranks - own.rss, "the machine has")]
    if _CONTROL_GROUP.exists() and (text := _CONTROL_GROUP.read_text().strip()) != "max":
        limits.append(MemoryLimit(int(text) // ranks - own.rss, "its control group has"))
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        limits.append(MemoryLimit(address_space - own.vms, "its address space has"))
    return min(limits, key=lambda limit: limit.bytes)
