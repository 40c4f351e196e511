"""Tensors in pieces: what each rank writes of them, and any stretch of them read back.

A rank holds flat stretches of the float32 state. Each goes into the rank's own file under its
tensor's name; the manifest says which file holds which stretch. One process writes whole tensors,
in their shape: a single piece each.

    tensors = StoredTensors(folder, placed)
    tensors["blocks.0.attn.qkv.weight"]     # put together from its files
    stretch(tensors, "blocks.0.attn.qkv.weight", 4096, 512)
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastjepa.checkpoint.tensor_file import CheckpointError, LazyTensors, memory_of, read_layout


@dataclass(frozen=True)
class Piece:
    """The elements from `start` on of a flattened tensor of `shape`; `data` holds them, flat, or
    in that shape if they are all."""

    data: Tensor
    shape: tuple[int, ...]
    start: int = 0


# What one rank writes: its pieces by part and name.
Shares = Mapping[str, Mapping[str, Piece]]


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Piece]:
    """Tensors that are in one piece."""
    return {name: Piece(tensor, tuple(tensor.shape)) for name, tensor in tensors.items()}


def host_copy(tensor: Tensor) -> Tensor:
    """A copy in the host's memory, pinned for a GPU's tensor: `wait_for_copies` comes first."""
    tensor = tensor.detach()
    if tensor.device.type == "cpu":
        return tensor.clone(memory_format=torch.contiguous_format)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def wait_for_copies(device: torch.device) -> None:
    """Until copies from this device have come."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


@dataclass(frozen=True)
class Placed:
    """Where a stored tensor lies: (file, first element, number of elements) for each piece."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Sequence[tuple[str, int, int]]


class StoredTensors(LazyTensors):
    """One part of a checkpoint in `folder`; only what is asked for is read, into fresh memory.

    Raises CheckpointError for a file that cannot be read or does not hold what it should.
    """

    def __init__(self, folder: Path, placed: Mapping[str, Placed]) -> None:
        self._folder, self._placed = folder, placed
        self._layouts: dict[str, dict[str, tuple[torch.dtype, list[int], int]]] = {}

    def __getitem__(self, name: str) -> Tensor:
        shape = self._placed[name].shape
        return self.stretch(name, 0, torch.Size(shape).numel()).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._placed)

    def __len__(self) -> int:
        return len(self._placed)

    def __contains__(self, name: object) -> bool:
        return name in self._placed

    def empty(self) -> dict[str, Tensor]:
        return {
            name: torch.empty(one.shape, dtype=one.dtype, device="meta")
            for name, one in self._placed.items()
        }

    def stretch(self, name: str, start: int, numel: int) -> Tensor:
        """`numel` elements of a flattened tensor from `start` on."""
        placed = self._placed[name]
        found = torch.empty(numel, dtype=placed.dtype)
        for file, first, count in placed.pieces:
            low, high = max(start, first), min(start + numel, first + count)
            if low < high:
                self._read(file, name, low - first, found[low - start : high - start])
        return found

    def _read(self, file: str, name: str, start: int, into: Tensor) -> None:
        path = self._folder / file
        if file not in self._layouts:
            self._layouts[file] = read_layout(path)
        dtype, _, place = self._layouts[file][name]
        try:
            with path.open("rb") as stream:
                stream.seek(place + start * dtype.itemsize)
                read = stream.readinto(memory_of(into))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        if read != into.nbytes:
            raise CheckpointError(f"{path}: truncated, it ends within {name}")


def stretch(tensors: Mapping[str, Tensor], name: str, start: int, numel: int) -> Tensor:
    """`numel` elements of a flattened tensor from `start` on; of a stored one no more is read."""
    if isinstance(tensors, StoredTensors):
        return tensors.stretch(name, start, numel)
    return tensors[name].reshape(-1).narrow(0, start, numel)
