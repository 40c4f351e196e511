"""A trained encoder from a file, a folder or, if asked, the Hugging Face hub: `fastjepa.load`."""

import hashlib
from pathlib import Path

import torch

from fastjepa.checkpoint import CheckpointError, FoundEncoder, read_encoder
from fastjepa.checkpoint.catalogue import released
from fastjepa.checkpoint.hub import HUB, fetch
from fastjepa.checkpoint.strict import check_fit
from fastjepa.model import Encoder


def load(
    path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Encoder:
    """The encoder in `path`, ready for `encoder.features(...)`: in eval mode, without gradients.

    `path`: an official V-JEPA 2.1 or V-JEPA 2 `.pt`, a folder of Hugging Face's `VJEPA2Model`, a
    run folder, a checkpoint, an exported `.safetensors`, or `hf://OWNER/NAME[/FILE]`, which alone
    uses the network. Which it is stands in `encoder.origin`. On a CPU, tensors of this `dtype` stay
    mapped from the file, which must not be changed in place then. Raises CheckpointError (a
    ValueError) naming what was found, and each key that is missing, extra or of another shape.
    """
    return build(find(local(path)), str(path), device=device, dtype=dtype)


def local(path: str | Path) -> Path:
    """Where weights lie on this machine: a path as it is, an `hf://` name once it is fetched.

    Raises CheckpointError for what cannot be fetched.
    """
    name = str(path)
    return fetch(name.removeprefix(HUB)) if name.startswith(HUB) else Path(path)


def find(path: Path) -> FoundEncoder:
    """What lies at a local path; a released file is compared with the catalogue."""
    known = released(path.name)
    if known and not path.exists():
        raise CheckpointError(
            f"{path}: no such file; it is released at {known.url}: download it and give its path"
        )
    if known and known.sha256 and known.sha256 != _sha256(path):
        raise CheckpointError(f"{path}: damaged, its SHA-256 is not the released file's")
    return read_encoder(path)


def build(
    found: FoundEncoder,
    where: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Encoder:
    """An encoder around found tensors, which become its parameters without a copy if they can."""
    with torch.device("meta"):
        encoder = Encoder(**found.sizes)
    check_fit(encoder.state_dict(), found.tensors, where)
    placed = {name: t.to(device=device, dtype=dtype) for name, t in found.tensors.items()}
    encoder.load_state_dict(placed, assign=True)
    encoder.origin = found.about
    return encoder.eval().requires_grad_(False)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
