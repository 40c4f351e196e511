"""A golden file: one recorded training step of the official code, as networks and a micro-batch.

The file is safetensors; tests/golden/README.md lists its tensors. Widths and depths come from the
tensors, what leaves no trace in them (heads, supervised levels, lambda) from the metadata.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastjepa.checkpoint.encoder_sizes import shapes_say
from fastjepa.checkpoint.strict import load_strict
from fastjepa.checkpoint.tensor_file import read_tensors
from fastjepa.masking.batch import Masks, distance_weights
from fastjepa.model import Encoder, Predictor
from fastjepa.objective.dense_loss import Objective
from fastjepa.presets import default_levels
from fastjepa.train.step import Jepa, MicroBatch

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class GoldenStep:
    """A golden file on the device, floating-point tensors in the dtype of our weights."""

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise ValueError(f"{self.path}: no tensor {name}; expected one in a golden step")
        return self.tensors[name]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose name starts with `prefix`, without it."""
        return {k.removeprefix(prefix): t for k, t in self.tensors.items() if k.startswith(prefix)}

    def number(self, *keys: str) -> float:
        """The first of `keys` that the metadata have, a finite number not below 0."""
        raw = next((self.metadata[key] for key in keys if key in self.metadata), None)
        try:
            value = float(raw) if raw is not None else inf
        except ValueError:
            value = inf
        if not (isfinite(value) and value >= 0.0):
            raise ValueError(f"{self.path}: metadata {keys[0]}: expected a number, found {raw!r}")
        return value

    def count(self, key: str) -> int:
        value = self.number(key)
        if value < 1.0 or value != int(value):
            raise ValueError(
                f"{self.path}: metadata {key}: expected a whole number above 0, found {value:g}"
            )
        return int(value)

    def flag(self, key: str) -> bool:
        raw = self.metadata.get(key, "False")
        if raw.lower() not in ("true", "false"):
            raise ValueError(f"{self.path}: metadata {key}: expected True or False, found {raw!r}")
        return raw.lower() == "true"

    @property
    def distilled(self) -> bool:
        return self.metadata.get("kind") == "distill"


def read_golden(path: Path, device: torch.device, dtype: torch.dtype) -> GoldenStep:
    tensors, metadata = read_tensors(path)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    moved = {
        name: tensor.to(device, wide if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in tensors.items()
    }
    golden = GoldenStep(path, moved, metadata)
    if not metadata:
        raise ValueError(f"{path}: no metadata; expected the sizes of a golden step")
    return golden


def networks(golden: GoldenStep, attention: str) -> Jepa:
    """The networks of the file with its weights: widths and depths from the tensors, heads and the
    number of supervised levels from the metadata."""
    num_levels = golden.count("levels")
    encoder, levels = _encoder(golden, "encoder", num_levels, attention)
    source, source_levels = _encoder(golden, "target", num_levels, attention)
    predictor = _predictor(golden, encoder.width, source.width, num_levels, attention)
    objective = Objective(level_weights=(1.0 / num_levels,) * num_levels)
    if not golden.distilled:
        return Jepa(encoder, predictor, source, objective, levels, source_levels)
    average = deepcopy(encoder)
    return Jepa(encoder, predictor, average, objective, levels, source_levels, teacher=source)


def _encoder(
    golden: GoldenStep, part: str, num_levels: int, attention: str
) -> tuple[Encoder, tuple[int, ...]]:
    where, weights = f"{golden.path}: {part}", golden.under(f"{part}.")
    sizes = shapes_say(weights, where)
    levels, heads = default_levels(sizes["depth"]), golden.count("heads")
    if sizes.get("num_levels") != len(levels) or num_levels > len(levels):
        raise ValueError(
            f"{where}: {num_levels} levels by the metadata; expected at most {len(levels)} and as "
            f"many norms_block at depth {sizes['depth']}"
        )
    if part == "encoder":
        _agree(golden, {"width": sizes["width"], "depth": sizes["depth"]})
    _divides(golden, "heads", heads, sizes["width"])
    encoder = Encoder(
        width=sizes["width"], depth=sizes["depth"], heads=heads, mlp_width=sizes["mlp_width"],
        levels=levels, patch=sizes["patch"], tubelet=sizes["tubelet"], attention=attention,
    )  # fmt: skip
    return _loaded(encoder, golden, part), levels[-num_levels:]


def _predictor(
    golden: GoldenStep, encoder_width: int, target_width: int, num_levels: int, attention: str
) -> Predictor:
    norm = golden["predictor.predictor_norm.weight"]
    mlp = golden["predictor.predictor_blocks.0.mlp.fc1.weight"]
    weights = golden.under("predictor.")
    depth = len({name.split(".")[1] for name in weights if name.startswith("predictor_blocks.")})
    _agree(golden, {"pred_width": len(norm), "pred_depth": depth})
    heads = golden.count("pred_heads")
    _divides(golden, "pred_heads", heads, len(norm))
    predictor = Predictor(
        encoder_width=encoder_width, num_levels=num_levels, width=len(norm), depth=depth,
        heads=heads, mlp_width=len(mlp), out_width=target_width,
        num_mask_tokens=len(golden.under("predictor.mask_tokens.")),
        patch=golden["encoder.patch_embed.proj.weight"].shape[-1], attention=attention,
    )  # fmt: skip
    return _loaded(predictor, golden, "predictor")


def _agree(golden: GoldenStep, sizes: Mapping[str, int]) -> None:
    for key, value in sizes.items():
        if key in golden.metadata and golden.count(key) != value:
            raise ValueError(
                f"{golden.path}: metadata {key}: {golden.count(key)} where the tensors have {value}"
            )


def _divides(golden: GoldenStep, key: str, heads: int, width: int) -> None:
    if width % heads:
        raise ValueError(
            f"{golden.path}: metadata {key}: expected a divisor of {width}, found {heads}"
        )


def _loaded(network: Network, golden: GoldenStep, part: str) -> Network:
    like = golden["clip"]
    network = network.to(device=like.device, dtype=like.dtype)
    load_strict(network, golden.under(f"{part}."), f"{golden.path}: {part}")
    return network


def micro_batch(golden: GoldenStep, encoder: Encoder) -> MicroBatch:
    """The clip with its masks and our distance weights. ValueError where they do not fit."""
    clip = golden["clip"]
    grid = encoder.grid(clip)
    num_groups = len(golden.under("context_index."))
    if not num_groups or num_groups != len(golden.under("predict_index.")):
        raise ValueError(
            f"{golden.path}: expected as many predict_index.g as context_index.g and at least one, "
            f"found {len(golden.under('predict_index.'))} and {num_groups}"
        )
    context, predict = (
        tuple(_index(golden, f"{kind}_index.{g}", len(clip), grid) for g in range(num_groups))
        for kind in ("context", "predict")
    )
    offset = golden.flag("offset")
    weights = tuple(
        distance_weights(c, p, grid, offset=offset) for c, p in zip(context, predict, strict=True)
    )
    context_weight = golden.number("lambda", "lam")
    return MicroBatch(clip, Masks(context, predict, weights), 1.0, context_weight)


def _index(golden: GoldenStep, name: str, batch: int, grid: tuple[int, int, int]) -> Tensor:
    index, num_tokens = golden[name], grid[0] * grid[1] * grid[2]
    whole = index.dtype in (torch.int32, torch.int64)
    if not whole or index.ndim != 2 or len(index) != batch or not index.numel():
        raise ValueError(
            f"{golden.path}: {name}: expected whole numbers [{batch}, K], "
            f"found {index.dtype} {list(index.shape)}"
        )
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= num_tokens:
        raise ValueError(
            f"{golden.path}: {name}: expected token indices of 0 to {num_tokens - 1}, "
            f"found {low} to {high}"
        )
    return index.long()
