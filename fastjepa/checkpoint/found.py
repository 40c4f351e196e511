"""An encoder from wherever it lies: a run, a checkpoint, an exported, official or foreign file.

found = read_encoder(Path("runs/demo"))
found.tensors, found.sizes, found.about
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from fastjepa.checkpoint.encoder_sizes import (
    EncoderSizes,
    check_sizes,
    parse_sizes,
    preset_of,
    shapes_say,
)
from fastjepa.checkpoint.export import PREDICTOR
from fastjepa.checkpoint.huggingface import is_huggingface, read_huggingface
from fastjepa.checkpoint.layout import CHECKPOINTS, is_complete, latest_checkpoint, load_checkpoint
from fastjepa.checkpoint.load_meta import read_official
from fastjepa.checkpoint.tensor_file import CheckpointError, read_start, read_tensors

_PART = "target_encoder"


@dataclass(frozen=True)
class FoundEncoder:
    """An encoder and what it is: `about` is a line such as `V-JEPA 2.1, vit_large, ema_encoder of
    an official file`.

    `tensors` are mapped from the disk where the format allows it: files must not be changed in
    place while they are in use. `path` is the file or folder that was read: of a run, its
    checkpoint, which is of `step`.
    """

    tensors: Mapping[str, Tensor]
    sizes: EncoderSizes
    about: str
    path: Path
    kind: Literal["checkpoint", "exported", "official", "huggingface"]
    step: int | None = None


def read_encoder(path: Path) -> FoundEncoder:
    """The encoder for features in `path`, with its sizes.

    `path`: a run's folder or a checkpoint (its target encoder, the averaged one that is kept), a
    file of `write_encoder`, an official V-JEPA 2.1 or 2 file, or a folder of Hugging Face's
    `VJEPA2Model`. Raises CheckpointError that says what was found instead.
    """
    if not path.is_dir():
        return _read_file(path)
    if is_huggingface(path):
        tensors, sizes, _ = read_huggingface(path)
        about = _about(tensors, sizes, "a Hugging Face VJEPA2Model")
        return FoundEncoder(tensors, sizes, about, path, "huggingface")
    if is_complete(path) or not (path / CHECKPOINTS).is_dir():
        return _read_checkpoint(path)
    latest = latest_checkpoint(path)
    if latest is None:
        raise CheckpointError(f"{path}: a run's folder without a complete checkpoint")
    return _read_checkpoint(latest)


def read_networks(path: Path) -> tuple[dict[str, Mapping[str, Tensor]], FoundEncoder]:
    """Every network in `path` under the released names of the parts, and the encoder to use.

    `target_encoder` (`ema_encoder` of a distilled student), `encoder` and `predictor`, as far as
    they are there. Takes the same places as `read_encoder`, and raises CheckpointError as it does.
    """
    found = read_encoder(path)
    networks: dict[str, Mapping[str, Tensor]] = {_PART: found.tensors}
    if found.kind == "checkpoint":
        checkpoint = load_checkpoint(found.path, parts=("encoder", "predictor"))
        networks |= checkpoint.tensors
        if "teacher" in checkpoint.state:
            networks["ema_encoder"] = networks.pop(_PART)
    if found.kind == "huggingface":
        networks["predictor"] = read_huggingface(found.path)[2]
    if found.kind == "exported":
        networks["predictor"] = {
            name.removeprefix(PREDICTOR): tensor
            for name, tensor in read_tensors(found.path)[0].items()
            if name.startswith(PREDICTOR)
        }
    if found.kind == "official":
        _, predictor, info = read_official(found.path)
        encoders = [part for part in info.parts if part.endswith("encoder")]
        networks = {part: read_official(found.path, part)[0] for part in encoders}
        networks["predictor"] = predictor or {}
    return {part: tensors for part, tensors in networks.items() if tensors}, found


def _read_checkpoint(path: Path) -> FoundEncoder:
    checkpoint = load_checkpoint(path, parts=[_PART])
    tensors = checkpoint.tensors[_PART]
    sizes = parse_sizes(checkpoint.state.get("model"), f"{path}: model in state.json")
    check_sizes(sizes, tensors, str(path))
    about = _about(tensors, sizes, f"{_PART} of a run after {checkpoint.step} steps")
    return FoundEncoder(tensors, sizes, about, checkpoint.path, "checkpoint", checkpoint.step)


def _read_file(path: Path) -> FoundEncoder:
    if read_start(path, 9)[8:] == b"{":
        tensors, metadata = read_tensors(path)
        if "fastjepa" in metadata:
            sizes = parse_sizes(_decoded(metadata), str(path))
            tensors = {n: t for n, t in tensors.items() if not n.startswith(PREDICTOR)}
            check_sizes(sizes, tensors, str(path))
            about = _about(tensors, sizes, "an exported file")
            return FoundEncoder(tensors, sizes, about, path, "exported")
    tensors, _, info = read_official(path)
    if info.sizes is None:
        raise CheckpointError(
            f"{path}: an encoder of no released size, and nothing says its number of heads; "
            "give a run's folder or a file exported from it"
        )
    about = _about(tensors, info.sizes, f"{info.part} of an official file")
    levels = info.sizes["levels"]
    idle = [str(levels[number]) for number in info.untrained_levels]
    if 0 < len(idle) < len(levels):
        about += f", level{'s' if len(idle) > 1 else ''} {', '.join(idle)} not supervised"
    return FoundEncoder(tensors, info.sizes, about, path, "official")


def _about(tensors: Mapping[str, Tensor], sizes: EncoderSizes, origin: str) -> str:
    name = preset_of(shapes_say(tensors, origin)) or f"{sizes['depth']} blocks of {sizes['width']}"
    return f"V-JEPA {sizes['generation']}, {name}, {origin}"


def _decoded(metadata: Mapping[str, str]) -> dict[str, object]:
    names = EncoderSizes.__annotations__.keys() & metadata.keys()
    decoded: dict[str, object] = {}
    for name in names:
        try:
            decoded[name] = json.loads(metadata[name])
        except json.JSONDecodeError:
            decoded[name] = metadata[name]
    return decoded
