"""Named tensors in a safetensors file: any tensors in, one clear error when it is not sound.

`CheckpointError`, which everything in this package raises for bad files and folders, lives here.
"""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class CheckpointError(ValueError):
    """A checkpoint, weight file or run folder that cannot be read, written or trusted; one line."""


class LazyTensors(Mapping[str, Tensor]):
    """Named tensors of which each is read when it is asked for, anew each time."""

    @abstractmethod
    def empty(self) -> dict[str, Tensor]:
        """The same tensors without memory (meta): their names, shapes and dtypes."""


def described(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Names, shapes and dtypes of tensors, as tensors; nothing is read."""
    return tensors.empty() if isinstance(tensors, LazyTensors) else tensors


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Write tensors of any shape, device and stride to `path`, one after another.

    Lazy ones are read one at a time, and those that are not contiguous are copied one at a time;
    tied weights are written once per name. Returns the SHA-256 of what was written. Raises OSError
    (disk full, not writable) and CheckpointError (a tensor that safetensors has no form for).
    """
    known = described(tensors)
    for name, tensor in known.items():
        # Meta tensors describe the lazy ones.
        if (tensor.is_meta and known is tensors) or tensor.layout != torch.strided:
            raise CheckpointError(
                f"{path}: {name} is {tensor.device} {tensor.layout}; expected a dense tensor"
            )
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(f"{path}: {name} is {tensor.dtype}, which safetensors has not")
    # The widest first: every tensor then begins at a multiple of its elements' size.
    order = sorted(known, key=lambda name: (-known[name].itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for name in order:
        size = known[name].numel() * known[name].itemsize
        header[name] = {
            "dtype": _DTYPES[known[name].dtype],
            "shape": list(known[name].shape),
            "data_offsets": [place, place + size],
        }
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        start = [memoryview(len(text).to_bytes(8, "little") + text)]
        for memory in chain(start, (memory_of(tensors[name]) for name in order)):
            file.write(memory)
            digest.update(memory)
    return digest.hexdigest()


def memory_of(tensor: Tensor) -> memoryview:
    """A tensor's elements as bytes, in their order: its own memory where that is contiguous."""
    plain = tensor.detach().cpu().contiguous().view(-1)
    memory: Any = plain.view(torch.uint8).numpy()
    return memoryview(memory)


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


def read_layout(path: Path) -> dict[str, tuple[torch.dtype, list[int], int]]:
    """Each tensor's dtype, shape and first byte in a file; raises as `read_tensors` does."""
    with _opened(path):  # is it one?
        pass
    dtypes = {name: dtype for dtype, name in _DTYPES.items()}
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {
        name: (dtypes[entry["dtype"]], entry["shape"], 8 + size + entry["data_offsets"][0])
        for name, entry in header.items()
    }


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
