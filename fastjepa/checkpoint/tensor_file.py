"""Named tensors in a safetensors file: any tensors in, one clear error when it is not sound.

`CheckpointError`, which everything in this package raises for bad files and folders, lives here.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class CheckpointError(ValueError):
    """A checkpoint, weight file or run folder that cannot be read, written or trusted; one line."""


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors of any shape, device and stride to `path`.

    Only tensors that are not contiguous, or share memory with an earlier one (tied weights), are
    copied first; tied weights are written once per name. Raises OSError (disk full, not writable)
    and CheckpointError (a tensor that safetensors has no form for).
    """
    seen: set[tuple[str, int]] = set()
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.layout != torch.strided:
            raise CheckpointError(
                f"{path}: {name} is {tensor.device} {tensor.layout}; expected a dense tensor"
            )
        own = tensor.detach().contiguous()
        storage = (str(own.device), own.untyped_storage().data_ptr())
        if storage in seen:
            own = own.clone()
        elif own.numel():
            seen.add(storage)
        plain[name] = own
    try:
        save_file(plain, path, metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:
        # Failed system calls arrive as text, with the number at the end.
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number:
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise CheckpointError(f"{path}: cannot be written as safetensors: {error}") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read `path` to CPU tensors, mapped from the disk, and the metadata of its header.

    Raises CheckpointError: missing, truncated, not safetensors, or a pickle under that name (never
    opened as one).
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def read_some(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Only these tensors of a file; raises CheckpointError as `read_tensors` does."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in names}


def tensor_names(path: Path) -> list[str]:
    """The names in a file, in its order; raises CheckpointError as `read_tensors` does."""
    with _opened(path) as file:
        return list(file.keys())


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        if read_start(path, 4).startswith(_PICKLE_STARTS):
            raise CheckpointError(
                f"{path}: refused: a pickle (a PyTorch .pt file?) under this name; "
                "expected safetensors, which cannot run code"
            ) from error
        size = path.stat().st_size
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({size} bytes): {error}"
        ) from error


def read_start(path: Path, count: int) -> bytes:
    """The first `count` bytes of a file. Raises CheckpointError when it cannot be opened."""
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
