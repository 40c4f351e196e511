"""The machine and the software that figures are from."""

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def device_facts(device: torch.device) -> dict[str, Any]:
    """What a figure is of: type, name, threads or memory."""
    if device.type != "cuda":
        return {"type": device.type, "name": _processor(), "threads": torch.get_num_threads()}
    facts = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": facts.name,
        "memory_bytes": facts.total_memory,
        "l2_bytes": facts.L2_cache_size,
        "capability": f"{facts.major}.{facts.minor}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions(*packages: str) -> dict[str, str]:
    """Of Python and of installed packages."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str:
    """Of the checkout this file belongs to, with a + if files differ from it; empty without one."""
    file = Path(__file__)
    if shutil.which("git") is None:
        return ""
    for words in (
        ["ls-files", "--error-unmatch", file.name],
        ["describe", "--always", "--dirty=+"],
    ):
        done = subprocess.run(
            ["git", "-C", str(file.parent), *words], capture_output=True, text=True
        )
        if done.returncode:
            return ""
    return done.stdout.strip()
