"""Folders of Hugging Face's `VJEPA2Model`: config.json and safetensors, read and written.

Their names are a rewording of the released ones, with q, k and v apart; no transformers is needed
for it. That model is V-JEPA 2: one tokenizer, one norm, tiled RoPE, and positions on the square
grid of `crop_size`.

    tensors, sizes, predictor = read_huggingface(Path("vjepa2-vitl-fpc64-256"))
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastjepa.checkpoint.encoder_sizes import EncoderSizes, check_sizes, count_numbered
from fastjepa.checkpoint.tensor_file import CheckpointError, read_some, tensor_names, write_tensors
from fastjepa.durable import whole_file, write_text
from fastjepa.presets import default_levels

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_ENCODER, _PREDICTOR = "encoder.", "predictor."
# What that model computes by default, and all that is computed here.
_FIXED = {
    "model_type": "vjepa2",
    "hidden_act": "gelu",
    "in_chans": 3,
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
}
# Their words, ours; tried in this order, each at the start of a name.
_WORDS = (
    ("encoder.embeddings.patch_embeddings.", "patch_embed."),
    ("encoder.layernorm.", "norm."),
    ("encoder.layer.", "blocks."),
    ("predictor.embeddings.predictor_embeddings.", "predictor_embed."),
    ("predictor.layernorm.", "predictor_norm."),
    ("predictor.proj.", "predictor_proj."),
    ("predictor.layer.", "predictor_blocks."),
)
_MASK_TOKENS = "predictor.embeddings.mask_tokens"
_QKV = ("query", "key", "value")


class Setup(NamedTuple):
    """What a config says that no tensor and no size of an encoder does: the square in pixels whose
    grid positions are counted on, frames of a clip, the predictor's heads. As released by default.
    """

    crop: int = 256
    frames: int = 64
    predictor_heads: int = 12


_SETUP = ("crop_size", "frames_per_clip", "pred_num_attention_heads")


def is_huggingface(folder: Path) -> bool:
    """Whether a folder says that it is a model of Hugging Face's (a config.json)."""
    return (folder / CONFIG).is_file()


def read_huggingface(
    folder: Path,
) -> tuple[dict[str, Tensor], EncoderSizes, dict[str, Tensor]]:
    """Encoder tensors under the released names, sizes, and predictor tensors (maybe none).

    One block's q, k and v are in memory twice at most; the other tensors are mapped from the file.
    Raises CheckpointError: another model, a config that asks for what is not computed here, names
    that no encoder has, shapes that are not the config's.
    """
    config = _config(folder / CONFIG)
    files = _files(folder)
    foreign = [name for name in files if not name.startswith((_ENCODER, _PREDICTOR))]
    if foreign:
        raise CheckpointError(
            f"{folder}: not a VJEPA2Model: unexpected {', '.join(foreign[:4])}"
            + (f" and {len(foreign) - 4} more" if len(foreign) > 4 else "")
        )
    tensors = _read(files, _ENCODER)
    sizes = _sizes(config, folder / CONFIG)
    check_sizes(sizes, tensors, str(folder))
    return tensors, sizes, _read(files, _PREDICTOR)


def read_setup(folder: Path) -> Setup:
    """The setup that a folder's config.json says. Raises CheckpointError for what is no number."""
    config = _config(folder / CONFIG)
    said = {key: config.get(key, usual) for key, usual in zip(_SETUP, Setup(), strict=True)}
    if not all(type(value) is int and value > 0 for value in said.values()):
        raise CheckpointError(f"{folder / CONFIG}: expected whole numbers above 0, found {said}")
    return Setup(*said.values())


def write_huggingface(
    folder: Path,
    tensors: Mapping[str, Tensor],
    sizes: EncoderSizes,
    predictor: Mapping[str, Tensor] | None = None,
    setup: Setup | None = None,
) -> None:
    """Write an encoder as a `VJEPA2Model` of this `setup`, the released one if None.

    The modality embedding of videos goes into the tokenizer's bias. A V-JEPA 2 predictor is written
    too. Raises CheckpointError saying which part of the encoder that model has no form for.
    """
    setup = setup or Setup()
    check_sizes(sizes, tensors, "encoder to export")
    _refuse_inexpressible(sizes, setup.crop)
    plain = _as_2(tensors, sizes)
    own = dict(predictor or {})
    if any(name.startswith(("video_mod_embed", "predictor_embed.0.")) for name in own):
        raise CheckpointError(
            "predictor to export: of V-JEPA 2.1; VJEPA2Model has none such: leave it out"
        )
    config = {
        **_FIXED,
        "architectures": ["VJEPA2Model"],
        "torch_dtype": str(plain["norm.weight"].dtype).removeprefix("torch."),
        "patch_size": sizes["patch"],
        "crop_size": setup.crop,
        "tubelet_size": sizes["tubelet"],
        "frames_per_clip": setup.frames,
        "hidden_size": sizes["width"],
        "num_hidden_layers": sizes["depth"],
        "num_attention_heads": sizes["heads"],
        "mlp_ratio": _ratio(sizes["mlp_width"], sizes["width"]),
        **_predictor_config(own, setup.predictor_heads),
    }
    named = _their_names({**plain, **own})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / WEIGHTS) as temporary:
            write_tensors(temporary, named, {"format": "pt"})
        write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error.strerror or error}") from error


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("model_type") != "vjepa2":
        kind = config.get("model_type") if isinstance(config, dict) else None
        raise CheckpointError(f"{path}: model_type {kind!r}; expected 'vjepa2'")
    other = [
        f"{key} {config[key]!r} where only {value!r} is known"
        for key, value in _FIXED.items()
        if config.get(key, value) != value
    ]
    if other:
        raise CheckpointError(f"{path}: {'; '.join(other)}")
    return config


def _sizes(config: Mapping[str, Any], where: Path) -> EncoderSizes:
    defaults: dict[str, Any] = {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
        "mlp_ratio": 4.0, "patch_size": 16, "tubelet_size": 2,
    }  # fmt: skip
    said = {key: config.get(key, value) for key, value in defaults.items()}
    if not all(isinstance(value, int | float) and value > 0 for value in said.values()):
        raise CheckpointError(f"{where}: expected numbers above 0, found {said}")
    depth = int(said["num_hidden_layers"])
    return EncoderSizes(
        width=int(said["hidden_size"]),
        depth=depth,
        heads=int(said["num_attention_heads"]),
        mlp_width=int(said["hidden_size"] * said["mlp_ratio"]),
        levels=default_levels(depth),
        patch=int(said["patch_size"]),
        tubelet=int(said["tubelet_size"]),
        interpolate_rope=False,
        rope="tiled",
        generation="2",
    )


def _files(folder: Path) -> dict[str, Path]:
    """The file that holds each tensor."""
    index = folder / INDEX
    if not index.is_file():
        path = folder / WEIGHTS
        return dict.fromkeys(tensor_names(path), path)
    return {name: folder / part for part in shards(index) for name in tensor_names(folder / part)}


def shards(index: Path) -> list[str]:
    """The files beside an index of tensors that it names. Raises CheckpointError."""
    try:
        names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        parts = sorted({str(file) for file in names.values()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not an index of tensors: {error!r}") from error
    if any(Path(part).name != part for part in parts):
        raise CheckpointError(f"{index}: names files outside its folder: {', '.join(parts)}")
    return parts


def _read(files: Mapping[str, Path], start: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, under ours. Each file stays mapped while they live."""
    names = [name for name in files if name.startswith(start)]
    apart = [name for name in names if any(f".attention.{part}." in name for part in _QKV)]
    whole: dict[str, list[str]] = {}
    for name in names:
        if name not in apart:
            whole.setdefault(str(files[name]), []).append(name)
    tensors: dict[str, Tensor] = {}
    for path, there in whole.items():
        tensors |= {_our_name(name): t for name, t in read_some(Path(path), there).items()}
    for name in (name for name in apart if ".query." in name):
        trio = [name.replace(".query.", f".{part}.") for part in _QKV]
        absent = [part for part in trio if part not in files]
        if absent:
            raise CheckpointError(f"{files[name]}: no {', '.join(absent)}")
        # Opened for this block alone, so that its pages are given back before the next.
        parts = [read_some(files[part], [part])[part] for part in trio]
        tensors[_our_name(name).replace(".query.", ".qkv.")] = torch.cat(parts)
        del parts
    if _MASK_TOKENS in tensors:
        tokens = tensors.pop(_MASK_TOKENS)
        tensors |= {f"mask_tokens.{i}": token for i, token in enumerate(tokens)}
    return tensors


def _our_name(name: str) -> str:
    for theirs, ours in _WORDS:
        if name.startswith(theirs):
            name = ours + name.removeprefix(theirs)
            break
    return name.replace(".attention.", ".attn.")


def _their_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    tokens = [name for name in tensors if name.startswith("mask_tokens.")]
    for name, tensor in tensors.items():
        if name in tokens:
            continue
        theirs = name.replace(".attn.", ".attention.")
        for word, ours in _WORDS:
            if theirs.startswith(ours):
                theirs = word + theirs.removeprefix(ours)
                break
        if ".qkv." in theirs:
            for part, third in zip(_QKV, tensor.chunk(3), strict=True):
                named[theirs.replace(".qkv.", f".{part}.")] = third
        else:
            named[theirs] = tensor
    if tokens:
        count = range(len(tokens))
        named[_MASK_TOKENS] = torch.stack([tensors[f"mask_tokens.{i}"] for i in count])
    return named


def _refuse_inexpressible(sizes: EncoderSizes, crop: int) -> None:
    wrong = []
    if sizes["rope"] != "tiled":
        wrong.append(
            "its RoPE is V-JEPA 2.1's (interleaved), VJEPA2Model computes V-JEPA 2's (tiled); "
            "train with model.rope=tiled for that, or export to safetensors or ONNX"
        )
    if crop % sizes["patch"]:
        wrong.append(f"crop {crop} is no multiple of the patch {sizes['patch']}")
    elif sizes["interpolate_rope"] and crop != 256:
        wrong.append(f"its positions are interpolated, so only crop 256 fits, not {crop}")
    if wrong:
        raise CheckpointError(f"VJEPA2Model cannot express this encoder: {'; '.join(wrong)}")


def _as_2(tensors: Mapping[str, Tensor], sizes: EncoderSizes) -> dict[str, Tensor]:
    """The same function of videos, last level, with V-JEPA 2's parameters."""
    if sizes["generation"] == "2":
        return dict(tensors)
    last = f"norms_block.{len(sizes['levels']) - 1}."
    dropped = ("patch_embed_img.", "img_mod_embed", "video_mod_embed", "norms_block.")
    plain = {name: t for name, t in tensors.items() if not name.startswith(dropped)}
    plain |= {f"norm.{kind}": tensors[f"{last}{kind}"] for kind in ("weight", "bias")}
    bias = plain["patch_embed.proj.bias"]
    plain["patch_embed.proj.bias"] = bias + tensors["video_mod_embed"].flatten().to(bias.dtype)
    return plain


def _ratio(mlp_width: int, width: int) -> float:
    """A ratio that gives this width again when it is cut to a whole number."""
    ratio = mlp_width / width
    return ratio if int(width * ratio) == mlp_width else math.nextafter(ratio, math.inf)


def _predictor_config(predictor: Mapping[str, Tensor], heads: int) -> dict[str, Any]:
    """That model always has a predictor; without ours it is left as small as it can be."""
    if not predictor:
        return {"pred_num_hidden_layers": 0, "pred_num_mask_tokens": 1}
    width = predictor["predictor_norm.weight"].shape[0]
    mlp = predictor["predictor_blocks.0.mlp.fc1.weight"].shape[0]
    return {
        "pred_hidden_size": width,
        "pred_num_attention_heads": heads,
        "pred_num_hidden_layers": count_numbered(predictor, r"predictor_blocks\.(\d+)\."),
        "pred_num_mask_tokens": count_numbered(predictor, r"mask_tokens\.(\d+)"),
        "pred_mlp_ratio": _ratio(mlp, width),
    }
