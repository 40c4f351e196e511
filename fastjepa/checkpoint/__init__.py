"""Checkpoints never half-written and never silently wrong, official files, exports.

Reading order: `layout.py` (a checkpoint's folder), `strict.py` (tensors into a module),
`run_folder.py`, `found.py` (weights in), `export.py` (weights out).
"""

from fastjepa.checkpoint.encoder_sizes import EncoderSizes
from fastjepa.checkpoint.export import write_encoder, write_official
from fastjepa.checkpoint.found import FoundEncoder, read_encoder, read_networks
from fastjepa.checkpoint.huggingface import read_huggingface, write_huggingface
from fastjepa.checkpoint.layout import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from fastjepa.checkpoint.load_meta import OfficialInfo, read_official
from fastjepa.checkpoint.optimizer_state import pack_optimizer, unpack_optimizer
from fastjepa.checkpoint.rng import pack_rng, unpack_rng
from fastjepa.checkpoint.run_folder import check_writable, claim_run_folder
from fastjepa.checkpoint.strict import load_strict
from fastjepa.checkpoint.tensor_file import CheckpointError

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "EncoderSizes",
    "FoundEncoder",
    "OfficialInfo",
    "check_writable",
    "claim_run_folder",
    "latest_checkpoint",
    "load_checkpoint",
    "load_strict",
    "pack_optimizer",
    "pack_rng",
    "read_encoder",
    "read_huggingface",
    "read_networks",
    "read_official",
    "save_checkpoint",
    "unpack_optimizer",
    "unpack_rng",
    "write_encoder",
    "write_huggingface",
    "write_official",
]
