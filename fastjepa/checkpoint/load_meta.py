"""Official V-JEPA 2.1 and 2 files: plain tensors under the released names (docs/method.md section
7).

    encoder, predictor, info = read_official(Path("vjepa2_1_vitl_dist_vitG_384.pt"))

Pickles are read with `weights_only`: tensors and plain values only, mapped from the disk rather
than copied.
"""

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastjepa.checkpoint.encoder_sizes import (
    EncoderSizes,
    check_sizes,
    count_numbered,
    generation_of,
    parse_sizes,
    preset_of,
    shapes_say,
)
from fastjepa.checkpoint.tensor_file import CheckpointError, read_start, read_tensors
from fastjepa.presets import PRESETS, Generation

# By preference: distilled releases keep the averaged student, the others the target encoder.
_ENCODERS = ("ema_encoder", "target_encoder", "encoder")
_PREDICTOR = "predictor"
_PREFIXES = ("module.", "backbone.")
# Where `write_official` leaves the sizes, since shapes do not tell the number of heads.
SIZES_KEY = "fastjepa"


@dataclass(frozen=True)
class OfficialInfo:
    """What a file held. `part` was read out of `parts`.

    `sizes` is None when the shapes are no preset's and the file does not say: the number of heads
    leaves no trace in them.
    `untrained_levels` are the places in the list of levels whose norm is still at its initial value
    (distilled releases supervise only the last one).
    """

    path: Path
    part: str
    parts: tuple[str, ...]
    generation: Generation
    preset: str | None
    sizes: EncoderSizes | None
    untrained_levels: tuple[int, ...]
    predictor_depth: int | None


def read_official(
    path: Path, part: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, OfficialInfo]:
    """Encoder tensors, predictor tensors (None when the file has none) and what the file is.

    Reads a `.pt` file, or safetensors with the same keys (parts as prefixes, or a bare encoder).
    `part` picks `ema_encoder`, `target_encoder` or `encoder`; by default the first of these that is
    there. Raises CheckpointError: not such a file, a pickle that calls anything (refused before it
    runs), no such part, another model.
    """
    parts, said = _read_parts(path)
    present = tuple(name for name in _ENCODERS if name in parts)
    chosen = part or next(iter(present), "encoder")
    if chosen not in present:
        raise CheckpointError(f"{path}: no {chosen} in it; found {', '.join(parts) or 'nothing'}")
    encoder = _strip(parts[chosen], f"{path}: {chosen}")
    predictor = _strip(parts[_PREDICTOR], f"{path}: {_PREDICTOR}") if _PREDICTOR in parts else None
    where = f"{path}: {chosen}"
    generation, shapes = generation_of(encoder, where), shapes_say(encoder, where)
    preset = preset_of(shapes)
    if said is not None:
        sizes: EncoderSizes | None = parse_sizes(said, f"{path}: {SIZES_KEY}")
        check_sizes(sizes, encoder, where)  # type: ignore[arg-type]
    else:
        sizes = _sizes(preset, generation, shapes, where) if preset else None
    info = OfficialInfo(
        path=path,
        part=chosen,
        parts=tuple(parts),
        generation=generation,
        preset=preset,
        sizes=sizes,
        untrained_levels=_untrained_levels(encoder),
        predictor_depth=count_numbered(predictor, r"predictor_blocks\.(\d+)\.")
        if predictor
        else None,
    )
    return encoder, predictor, info


def _read_parts(path: Path) -> tuple[dict[str, Mapping[str, Any]], object]:
    """The networks in a file by name, and the sizes it says of itself, if any."""
    start = read_start(path, 4)
    if start == b"PK\x03\x04" or (start[:1] == b"\x80" and path.suffix != ".safetensors"):
        payload = _unpickle(path, mmap=start == b"PK\x03\x04")
        if not isinstance(payload, dict):
            raise CheckpointError(
                f"{path}: expected a dict of parts, found {type(payload).__name__}"
            )
        parts = {
            name: payload[name]
            for name in (*_ENCODERS, _PREDICTOR)
            if isinstance(payload.get(name), dict)
        }
        return parts or {"encoder": payload}, payload.get(SIZES_KEY)
    tensors, _ = read_tensors(path)
    split = {
        name: {
            key.removeprefix(f"{name}."): t
            for key, t in tensors.items()
            if key.startswith(f"{name}.")
        }
        for name in (*_ENCODERS, _PREDICTOR)
    }
    return {name: named for name, named in split.items() if named} or {"encoder": tensors}, None


def _unpickle(path: Path, mmap: bool) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        found = f"it calls {forbidden[1]}" if forbidden else "it holds more than that"
        raise CheckpointError(
            f"{path}: refused: only tensors and plain values are read from a pickle, and {found}"
        ) from error
    # What the reader raises on damaged bytes.
    except (
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not a whole PyTorch file: {reason}") from error


def _strip(named: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    stripped: dict[str, Tensor] = {}
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{where}: {name} is {type(value).__name__}; expected a tensor")
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        stripped[name] = value
    return stripped


def _sizes(
    preset: str, generation: Generation, shapes: Mapping[str, int], where: str
) -> EncoderSizes:
    size = PRESETS[preset]
    # V-JEPA 2 has one norm for whichever levels.
    count = shapes.get("num_levels", len(size.levels))
    levels = {1: (size.depth - 1,), len(size.levels): size.levels}.get(count)
    if levels is None:
        raise CheckpointError(
            f"{where}: {count} norms_block; expected 1 or {len(size.levels)} for {preset}"
        )
    return EncoderSizes(
        width=size.width,
        depth=size.depth,
        heads=size.heads,
        mlp_width=size.mlp_width,
        levels=levels,
        patch=shapes["patch"],
        tubelet=shapes["tubelet"],
        interpolate_rope=generation == "2.1",
        rope="interleaved" if generation == "2.1" else "tiled",
        generation=generation,
    )


def _untrained_levels(encoder: Mapping[str, Tensor]) -> tuple[int, ...]:
    norms = sorted(
        int(match[1])
        for name in encoder
        if (match := re.fullmatch(r"norms_block\.(\d+)\.weight", name))
    )
    return tuple(
        level
        for level in norms
        if bool((encoder[f"norms_block.{level}.weight"] == 1).all())
        and not encoder.get(f"norms_block.{level}.bias", torch.zeros(1)).any()
    )
