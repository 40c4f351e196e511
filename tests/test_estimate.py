"""The activations that are estimated, against those of our own step: as allocated on a CPU, and at
full size as autograd keeps them."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastjepa.build import build_jepa
from fastjepa.config.load import load_recipe
from fastjepa.config.resolve import resolve
from fastjepa.config.streams import Stream
from fastjepa.estimate import StreamCosts
from fastjepa.masking.batch import Masks
from fastjepa.model.block import blocks_of
from fastjepa.observe.flops import TokenNumbers
from fastjepa.observe.footprint import Activations
from fastjepa.recipe_parts import mask_maker
from fastjepa.train.step import Jepa, MicroBatch, forward

ROOT = Path(__file__).parents[1]
# The formula for attention, with the score matrices that a GPU's does not hold.
PLAIN = ("model.attention=math", "engine.dtype=float32", "data.image=[]")


@dataclass(frozen=True)
class Case:
    """A step's networks, clips and masks on a device, with the bytes estimated for them."""

    jepa: Jepa
    stream: Stream
    masks: Masks
    clip: Tensor
    estimated: Activations

    def forward(self) -> Tensor:
        batch = MicroBatch(self.clip, self.masks, share=1.0, context_weight=0.5)
        return forward(self.jepa, [batch], torch.float32)[0].total


def case(recipe_file: str, *overrides: str, device: str) -> Case:
    recipe = load_recipe(ROOT / recipe_file, (*PLAIN, *overrides))
    resolved = resolve(recipe)
    stream = resolved.streams["video"]
    with torch.device(device):
        jepa = build_jepa(recipe, resolved, torch.device(device))
    jepa.target.requires_grad_(False)
    for block in blocks_of(jepa.encoder, jepa.predictor, jepa.target):
        block.by_hand = "gpu"
    masks = mask_maker(recipe, stream)(0)
    tokens = TokenNumbers(
        stream.tokens,
        tuple(index.shape[1] for index in masks.context),
        tuple(index.shape[1] for index in masks.predict),
    )
    estimated = StreamCosts(recipe, resolved).activations(
        stream, [tokens], checkpointing=recipe.model.checkpointing
    )
    shape = stream.clips, 3, stream.frames, stream.crop, stream.crop
    clip = torch.zeros(shape, device=device)
    return Case(jepa, stream, masks.to(torch.device(device)), clip, estimated)


def kept_for_backward(step: Case) -> int:
    """Bytes of all tensors that autograd keeps of a forward, weights aside."""
    networks = step.jepa.encoder, step.jepa.predictor, step.jepa.target
    weights = {p.untyped_storage()._cdata for net in networks for p in net.parameters()}
    kept = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        step.forward()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(
    ("sizes", "checkpointing"),
    [
        (("data.crop=96", "data.frames=4", "data.batch=8"), False),
        (("data.batch=4",), True),
        (("data.crop=96", "data.frames=4", "data.batch=8"), "encoder"),
    ],
)
def test_a_vit_larges_step_keeps_what_is_estimated(
    sizes: tuple[str, ...], checkpointing: bool | str
) -> None:
    """At full size without memory, on the meta device. Levels, targets, clip and a recomputed block
    are alive, too, but not kept by autograd."""
    large = case(
        "configs/vitl16/pretrain-256px-16f.yaml", f"model.checkpointing={checkpointing}", *sizes,
        device="meta",
    )  # fmt: skip
    visible = sum(index.numel() for index in large.masks.context)
    width, levels = large.jepa.encoder.width, len(large.jepa.levels)
    level_outputs = 4 * visible * levels * width
    targets = 4 * large.stream.clips * large.stream.tokens * levels * width
    estimated = large.estimated.total - large.estimated.clip - large.estimated.recomputed
    expected = estimated - level_outputs - targets
    assert kept_for_backward(large) == pytest.approx(expected, rel=0.05)
