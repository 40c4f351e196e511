"""One encoder, ready to use: written as a single safetensors file, read back from wherever it lies.

write_encoder(Path("encoder.safetensors"), tensors, sizes)
tensors, sizes = read_encoder(Path("runs/demo"))  # or a checkpoint, an exported file, a .pt
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

import fastjepa
from fastjepa.checkpoint.durable import replace
from fastjepa.checkpoint.encoder_sizes import EncoderSizes, check_sizes, parse_sizes
from fastjepa.checkpoint.layout import CHECKPOINTS, is_complete, latest_checkpoint, load_checkpoint
from fastjepa.checkpoint.load_meta import read_official
from fastjepa.checkpoint.tensor_file import CheckpointError, read_start, read_tensors, write_tensors

_PART = "target_encoder"


def write_encoder(path: Path, encoder_tensors: Mapping[str, Tensor], sizes: EncoderSizes) -> None:
    """Write an encoder under the released names, its sizes in the header.

    An older file is replaced whole. Raises CheckpointError: sizes that are not the tensors', a path
    that cannot be written.
    """
    check_sizes(parse_sizes(sizes, "sizes"), encoder_tensors, "encoder to export")
    metadata = {key: json.dumps(value) for key, value in sizes.items()}
    metadata |= {"format": "pt", "fastjepa": fastjepa.__version__}
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(temporary, encoder_tensors, metadata)
        replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)


def read_encoder(path: Path) -> tuple[dict[str, Tensor], EncoderSizes]:
    """The encoder for features in `path`, with its sizes.

    `path`: a run's folder or a checkpoint (its target encoder, the averaged one that is kept), a
    file of `write_encoder`, or an official V-JEPA 2.1 file. Raises CheckpointError that says what
    was found instead.
    """
    if not path.is_dir():
        return _read_file(path)
    if is_complete(path) or not (path / CHECKPOINTS).is_dir():
        return _read_checkpoint(path)
    latest = latest_checkpoint(path)
    if latest is None:
        raise CheckpointError(f"{path}: a run's folder without a complete checkpoint")
    return _read_checkpoint(latest)


def _read_checkpoint(path: Path) -> tuple[dict[str, Tensor], EncoderSizes]:
    checkpoint = load_checkpoint(path, parts=[_PART])
    tensors = checkpoint.tensors[_PART]
    sizes = parse_sizes(checkpoint.state.get("model"), f"{path}: model in state.json")
    check_sizes(sizes, tensors, str(path))
    return tensors, sizes


def _read_file(path: Path) -> tuple[dict[str, Tensor], EncoderSizes]:
    if read_start(path, 9)[8:] == b"{":
        tensors, metadata = read_tensors(path)
        if "fastjepa" in metadata:
            sizes = parse_sizes(_decoded(metadata), str(path))
            check_sizes(sizes, tensors, str(path))
            return tensors, sizes
    tensors, _, info = read_official(path)
    if info.sizes is None:
        raise CheckpointError(
            f"{path}: an encoder of no released size, and nothing says its number of heads; "
            "give a run's folder or a file exported from it"
        )
    return tensors, info.sizes


def _decoded(metadata: Mapping[str, str]) -> dict[str, object]:
    names = EncoderSizes.__annotations__.keys() & metadata.keys()
    decoded: dict[str, object] = {}
    for name in names:
        try:
            decoded[name] = json.loads(metadata[name])
        except json.JSONDecodeError:
            decoded[name] = metadata[name]
    return decoded
