"""Weights out: an encoder, with its predictor, as a safetensors file, or whole networks in the
official layout.

write_encoder(Path("encoder.safetensors"), tensors, sizes)
write_official(Path("official.pt"), {"target_encoder": tensors, "predictor": more}, sizes)
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

import fastjepa
from fastjepa.checkpoint.encoder_sizes import EncoderSizes, check_sizes, parse_sizes
from fastjepa.checkpoint.load_meta import SIZES_KEY
from fastjepa.checkpoint.tensor_file import (
    CheckpointError,
    LazyTensors,
    described,
    write_tensors,
)
from fastjepa.durable import whole_file

# How the released files name every tensor.
_PREFIX = "module.backbone."
# Before a predictor's names in a file that begins with an encoder's.
PREDICTOR = "predictor."


class _Together(LazyTensors):
    """Tensors of several parts as one, each name behind its part's prefix."""

    def __init__(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._places = {
            f"{prefix}{name}": (tensors, name)
            for prefix, tensors in parts.items()
            for name in tensors
        }

    def __getitem__(self, name: str) -> Tensor:
        tensors, own = self._places[name]
        return tensors[own]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def empty(self) -> dict[str, Tensor]:
        known = {id(tensors): described(tensors) for tensors, _ in self._places.values()}
        return {
            name: known[id(tensors)][own].to("meta")
            for name, (tensors, own) in self._places.items()
        }


def write_encoder(
    path: Path,
    encoder_tensors: Mapping[str, Tensor],
    sizes: EncoderSizes,
    notes: Mapping[str, str] | None = None,
    predictor: Mapping[str, Tensor] | None = None,
) -> None:
    """Write an encoder under the released names, its sizes and `notes` in the header.

    A predictor's names begin with `predictor.`. Stored tensors go from file to file, one in memory
    at a time. An older file is replaced whole. Raises CheckpointError: sizes that are not the
    tensors', a path that cannot be written.
    """
    check_sizes(parse_sizes(sizes, "sizes"), encoder_tensors, "encoder to export")
    metadata = {key: json.dumps(value) for key, value in sizes.items()}
    metadata |= {**(notes or {}), "format": "pt", "fastjepa": fastjepa.__version__}
    tensors = _Together({"": encoder_tensors, PREDICTOR: predictor or {}})
    _write(path, lambda temporary: write_tensors(temporary, tensors, metadata))


def write_official(
    path: Path, parts: Mapping[str, Mapping[str, Tensor]], sizes: EncoderSizes
) -> None:
    """Write networks as the released files hold them: a `.pt` of dicts, each name with its prefix.

    `parts`: `target_encoder` or `ema_encoder`, `encoder`, `predictor`, under plain names. An entry
    more says the encoder's sizes, which official code passes over. An older file is replaced whole.
    Raises CheckpointError: sizes that are not the tensors', a path that cannot be written.
    """
    encoders = [name for name in parts if name.endswith("encoder")]
    if not encoders:
        raise CheckpointError(f"official file: no encoder among {', '.join(parts) or 'nothing'}")
    for name in encoders:
        check_sizes(sizes, parts[name], f"{name} to export")
    named = {
        part: {f"{_PREFIX}{name}": tensor for name, tensor in tensors.items()}
        for part, tensors in parts.items()
    }
    said = {SIZES_KEY: {**sizes, "levels": list(sizes["levels"])}}
    _write(path, lambda temporary: torch.save({**named, **said}, temporary))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            write(temporary)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error
