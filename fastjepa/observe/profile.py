"""A Chrome trace of chosen steps, in which a step's stages have their names (`stages.named`).

    profile = StepProfile((10, 12), Path("runs/mine/profile"), rank=0, device=device)
    profile.before(10); ...; profile.after(10)

Open the files at https://ui.perfetto.dev or chrome://tracing.
"""

from pathlib import Path

import torch


def profiler(device: torch.device) -> torch.profiler.profile:
    """PyTorch's, for what the host and `device` do."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities)


class StepProfile:
    """Records the steps first..last, counted from 1 as in metrics.jsonl, into one file a rank."""

    def __init__(
        self, steps: tuple[int, int], folder: Path, *, rank: int, device: torch.device
    ) -> None:
        self.first, self.last = steps
        self._folder, self._rank, self._device = folder, rank, device
        self._running: torch.profiler.profile | None = None
        self._recorded: tuple[int, int] | None = None

    def before(self, step: int) -> None:
        """Call ahead of each step: recording starts with the first of those chosen."""
        if self._running is None and self.first <= step <= self.last:
            self._running = profiler(self._device)
            self._running.start()
            self._recorded = (step, step)

    def after(self, step: int) -> Path | None:
        """Call behind each step; the file, once the last of those chosen is done."""
        if self._running is None or self._recorded is None:
            return None
        self._recorded = (self._recorded[0], step)
        return self.close() if step >= self.last else None

    def close(self) -> Path | None:
        """Write what has been recorded, if anything: a run may stop before the last step."""
        if self._running is None or self._recorded is None:
            return None
        running, self._running = self._running, None
        running.stop()
        first, last = self._recorded
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"steps-{first}-{last}.rank-{self._rank}.json.gz"
        running.export_chrome_trace(str(path))
        return path
