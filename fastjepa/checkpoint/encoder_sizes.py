"""The numbers that rebuild an encoder around its tensors, compared with their shapes."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict, get_args

from torch import Tensor

from fastjepa.checkpoint.tensor_file import CheckpointError, described
from fastjepa.presets import PRESETS, Generation, Rope


class EncoderSizes(TypedDict):
    """Keyword arguments of an encoder (docs/method.md section 2); `levels` are 0-based block
    indices."""

    width: int
    depth: int
    heads: int
    mlp_width: int
    levels: tuple[int, ...]
    patch: int
    tubelet: int
    interpolate_rope: bool
    rope: Rope
    generation: Generation


_NUMBERS = ("width", "depth", "heads", "mlp_width", "patch", "tubelet")


def parse_sizes(raw: object, where: str) -> EncoderSizes:
    """Check sizes read from JSON, other keys passed over. Raises CheckpointError naming the key."""
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"{where}: expected the encoder's sizes by name, found {raw!r}")
    numbers = {key: _positive(raw, key, where) for key in _NUMBERS}
    levels = raw.get("levels")
    depth = numbers["depth"]
    if (
        not isinstance(levels, list | tuple)
        or not levels
        or not all(type(level) is int and 0 <= level < depth for level in levels)
        or sorted(set(levels)) != list(levels)
    ):
        raise CheckpointError(
            f"{where}: levels {levels!r}; expected rising block indices from 0 to {depth - 1}"
        )
    interpolate = raw.get("interpolate_rope")
    if not isinstance(interpolate, bool):
        raise CheckpointError(f"{where}: interpolate_rope {interpolate!r}; expected true or false")
    return EncoderSizes(
        width=numbers["width"],
        depth=depth,
        heads=numbers["heads"],
        mlp_width=numbers["mlp_width"],
        levels=tuple(levels),
        patch=numbers["patch"],
        tubelet=numbers["tubelet"],
        interpolate_rope=interpolate,
        rope=_one_of(Rope, raw, "rope", where),
        generation=_one_of(Generation, raw, "generation", where),
    )


def generation_of(tensors: Mapping[str, Tensor], where: str) -> Generation:
    """V-JEPA 2.1 or 2, by the names that only one of them has.

    Raises CheckpointError for the tensors of another model, saying what was found.
    """
    if "patch_embed.proj.weight" not in tensors:
        raise CheckpointError(
            f"{where}: not a V-JEPA 2 or 2.1 encoder: no patch_embed.proj.weight; "
            f"found {_some(tensors)}"
        )
    if "pos_embed" in tensors:
        raise CheckpointError(
            f"{where}: pos_embed: an encoder with learned or fixed absolute positions, such as "
            "V-JEPA 1; only V-JEPA 2 and 2.1, which turn by RoPE, can be read"
        )
    only_21 = ("patch_embed_img.", "norms_block.", "img_mod_embed", "video_mod_embed")
    return "2.1" if any(name.startswith(only_21) for name in tensors) else "2"


def shapes_say(tensors: Mapping[str, Tensor], where: str) -> dict[str, int]:
    """An encoder's sizes as its tensors' shapes have them, of V-JEPA 2.1 with `num_levels`.

    Heads leave no trace. Raises CheckpointError when these are not the tensors of a V-JEPA 2 or
    2.1 encoder, saying what was found instead.
    """
    tensors = described(tensors)
    generation = generation_of(tensors, where)
    needed = ["blocks.0.mlp.fc1.weight"]
    needed.append("patch_embed_img.proj.weight" if generation == "2.1" else "norm.weight")
    absent = [name for name in needed if name not in tensors]
    if absent:
        raise CheckpointError(
            f"{where}: not a V-JEPA {generation} encoder: no {', '.join(absent)}; "
            f"found {_some(tensors)}"
        )
    tokenizer = tensors["patch_embed.proj.weight"].shape
    mlp = tensors["blocks.0.mlp.fc1.weight"].shape
    if len(tokenizer) != 5 or len(mlp) != 2 or tokenizer[3] != tokenizer[4]:
        raise CheckpointError(
            f"{where}: patch_embed.proj.weight {list(tokenizer)} and "
            f"blocks.0.mlp.fc1.weight {list(mlp)}; "
            "expected [width, 3, tubelet, patch, patch] and [mlp_width, width]"
        )
    shapes = {
        "width": tokenizer[0],
        "depth": count_numbered(tensors, r"blocks\.(\d+)\."),
        "mlp_width": mlp[0],
        "patch": tokenizer[3],
        "tubelet": tokenizer[2],
    }
    if generation == "2.1":
        shapes["num_levels"] = count_numbered(tensors, r"norms_block\.(\d+)\.")
    return shapes


def check_sizes(sizes: EncoderSizes, tensors: Mapping[str, Tensor], where: str) -> None:
    """Compare sizes with their tensors' shapes. Raises CheckpointError naming each difference."""
    given: dict[str, Any] = {**sizes, "num_levels": len(sizes["levels"])}
    generation = generation_of(tensors, where)
    wrong = (
        []
        if sizes["generation"] == generation
        else [f"generation {sizes['generation']} where the tensors have {generation}"]
    )
    wrong += [
        f"{key} {given[key]} where the tensors have {value}"
        for key, value in shapes_say(tensors, where).items()
        if given[key] != value
    ]
    if sizes["width"] % sizes["heads"]:
        wrong.append(f"heads {sizes['heads']}, which does not divide width {sizes['width']}")
    if wrong:
        raise CheckpointError(f"{where}: sizes do not belong to the tensors: {'; '.join(wrong)}")


def preset_of(shapes: Mapping[str, int]) -> str | None:
    """The name in the zoo of an encoder with these `shapes_say`, None when it has no such sizes."""
    key = (shapes["width"], shapes["depth"], shapes["mlp_width"])
    return next(
        (name for name, size in PRESETS.items() if (size.width, size.depth, size.mlp_width) == key),
        None,
    )


def count_numbered(names: Iterable[str], pattern: str) -> int:
    """How many different numbers the pattern's group finds at the start of the names."""
    return len({match[1] for name in names if (match := re.match(pattern, name))})


def _one_of(known: Any, raw: Mapping[Any, Any], key: str, where: str) -> Any:
    """The first of `known` where there is no such key: files of older versions have none."""
    choices = get_args(known)
    value = raw.get(key, choices[0])
    if value not in choices:
        raise CheckpointError(f"{where}: {key} {value!r}; expected {' or '.join(choices)}")
    return value


def _positive(raw: Mapping[Any, Any], key: str, where: str) -> int:
    value = raw.get(key)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{where}: {key} {value!r}; expected a whole number above 0")
    return value


def _some(tensors: Mapping[str, Tensor]) -> str:
    names = list(tensors)
    return (
        ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        or "nothing"
    )
