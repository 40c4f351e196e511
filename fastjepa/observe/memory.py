"""Memory this process holds: resident now and at its highest, and the CUDA allocator's peak."""

import resource
import sys
from dataclasses import dataclass

import torch

_GIB = 2**30


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
