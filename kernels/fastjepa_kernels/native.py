"""C++ of this package, compiled where it runs, at its first use, and kept for later processes.

It needs a C++ compiler, as Triton needs one in C, and no header but the compiler's and ours.
OpenMP's threads are those of the runtime that PyTorch has loaded: a second one would take the same
cores.
"""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

# Imported first, so that the library finds PyTorch's OpenMP.
import torch  # noqa: F401


class CannotCompileError(Exception):
    """Why there is no library."""


def load(source: Path, flags: Sequence[str]) -> ctypes.CDLL:
    """The library that `source` compiles to with `flags`, from the cache if it is there.

    The cache is `fastjepa_kernels` in $XDG_CACHE_HOME, or ~/.cache; without one that can be
    written, every process compiles. The compiler is $CXX, or g++, c++ or clang++. Raises
    CannotCompileError without a compiler, where it fails, and where its library does not load.
    """
    command = [_compiler(), "-std=c++17", "-O3", "-fPIC", "-fopenmp", *flags]
    key = hashlib.sha256("\0".join([*command, *_texts(source)]).encode()).hexdigest()[:16]
    kept = _cache() / f"{source.stem}-{key}.so"
    try:
        return ctypes.CDLL(str(kept))
    except OSError:
        pass
    with tempfile.TemporaryDirectory(prefix="fastjepa-") as folder:
        made = Path(folder) / kept.name
        _compile(command, source, made)
        try:
            library = ctypes.CDLL(str(made))
        except OSError as error:
            raise CannotCompileError(f"what {command[0]} made does not load: {error}") from error
        _keep(made, kept)
    return library


def _texts(source: Path) -> list[str]:
    """What it says, and the headers beside it that it includes."""
    text = source.read_text()
    headers = re.findall(r'^#include "(.+)"$', text, re.MULTILINE)
    return [text, *(part for name in headers for part in _texts(source.parent / name))]


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and shutil.which(name):
            return name
    raise CannotCompileError("there is no C++ compiler: g++, c++, clang++ or $CXX")


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "fastjepa_kernels"


def _compile(command: Sequence[str], source: Path, library: Path) -> None:
    parts = library.with_suffix(".o")
    # Linked without -fopenmp, whose runtime is PyTorch's.
    steps = [*command, "-c", str(source), "-o", str(parts)], [
        command[0], "-shared", str(parts), "-o", str(library),
    ]  # fmt: skip
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            told = next((line for line in lines if "error" in line), lines[-1])
            raise CannotCompileError(f"{command[0]} failed: {told}")


def _keep(library: Path, kept: Path) -> None:
    """Whole or not at all, for processes that look while others write."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as beside:
            beside.write(library.read_bytes())
        os.replace(beside.name, kept)
    except OSError:
        return
