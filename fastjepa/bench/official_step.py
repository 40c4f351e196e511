"""The official V-JEPA 2.1 step from a checkout given by path: their modules, called as their
trainer calls them.

Nothing of the checkout is copied: this file imports its encoder, predictor, wrappers, mask
distances and mask gathering, and drives them in the order of its training script.
"""

import copy
import importlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastjepa.bench.checkout import make_importable
from fastjepa.masking.batch import Masks
from fastjepa.observe.stages import stage
from fastjepa.presets import EncoderSize

MODULES = "app.vjepa_2_1.models"
# Their levels follow from the depth, of which they know these.
ENCODER_DEPTHS, PREDICTOR_DEPTHS = (12, 24, 40, 48), (4, 8, 12, 20, 24, 40)


@dataclass(frozen=True)
class Sizes:
    """What both sides build: clips of `frames` x `pixels` x `pixels`, the encoder, the predictor's
    width, depth, heads and mask tokens."""

    pixels: int
    frames: int
    patch: int
    tubelet: int
    encoder: EncoderSize
    predictor: tuple[int, int, int, int]


@dataclass(frozen=True)
class Update:
    """What a step is told: the loss's lambda, AdamW's numbers, the EMA's momentum."""

    context_weight: float
    offset: bool
    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    momentum: float


class OfficialStep:
    """One official training step: same weights, clip and masks as ours, AdamW and EMA as its
    trainer has them.

    `dtype` bfloat16 is their autocast. `compiled` is their `compile_model`. Raises ValueError for
    a path that is no checkout and for depths that the official code does not know.
    """

    def __init__(
        self,
        path: Path,
        sizes: Sizes,
        update: Update,
        *,
        weights: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
        dtype: torch.dtype,
        device: torch.device,
        compiled: bool,
    ) -> None:
        make_importable(path)
        # Deprecated on CUDA and needless on a CPU, yet opened around every attention call.
        if not torch.cuda.is_available():
            torch.backends.cuda.sdp_kernel = nullcontext  # type: ignore[assignment]
        encoder = sizes.encoder
        width, depth, heads, mask_tokens = sizes.predictor
        for key, found, known in (
            ("model.depth", encoder.depth, ENCODER_DEPTHS),
            ("model.predictor.depth", depth, PREDICTOR_DEPTHS),
        ):
            if found not in known:
                raise ValueError(
                    f"{key}: {found}, and the official code knows {', '.join(map(str, known))}"
                )
        load = importlib.import_module
        wrappers = load("app.vjepa_2_1.wrappers")
        self.apply_masks = load("src.masks.utils").apply_masks
        self.mask_distance = load(f"{MODULES}.utils.masks_dist").compute_mask_distance
        shape: dict[str, Any] = {
            "img_size": sizes.pixels,
            "num_frames": max(sizes.frames, sizes.tubelet),
            "patch_size": sizes.patch,
            "tubelet_size": sizes.tubelet,
            "use_rope": True,
            "interpolate_rope": True,
            "img_temporal_dim_size": 1,
            "modality_embedding": True,
        }
        self.width = encoder.width
        self.encoder = wrappers.MultiSeqWrapper(
            load(f"{MODULES}.vision_transformer").VisionTransformer(
                embed_dim=encoder.width, depth=encoder.depth, num_heads=encoder.heads,
                mlp_ratio=encoder.mlp_width / encoder.width, use_sdpa=True,
                norm_layer=partial(nn.LayerNorm, eps=1e-6), **shape,
            )
        )  # fmt: skip
        self.predictor = wrappers.PredictorMultiSeqWrapper(
            load(f"{MODULES}.predictor").vit_predictor(
                embed_dim=self.width, predictor_embed_dim=width, depth=depth, num_heads=heads,
                use_mask_tokens=True, num_mask_tokens=mask_tokens, return_all_tokens=True, **shape,
            )
        )  # fmt: skip
        self.grid_side, self.dtype, self.update = sizes.pixels // sizes.patch, dtype, update
        self.encoder.backbone.load_state_dict(weights[0])
        self.predictor.backbone.load_state_dict(weights[1])
        self.encoder.to(device), self.predictor.to(device)
        self.target = copy.deepcopy(self.encoder).requires_grad_(False)
        groups = []
        for decayed in (True, False):
            for module in (self.encoder, self.predictor):
                chosen = [
                    p
                    for n, p in module.named_parameters()
                    if ("bias" in n or p.ndim == 1) != decayed
                ]
                decay = update.weight_decay if decayed else 0.0
                groups.append({"params": chosen, "weight_decay": decay})
        self.optimizer = torch.optim.AdamW(groups, lr=update.lr, betas=update.betas, eps=update.eps)
        if compiled:
            for module in (self.encoder, self.target, self.predictor):
                module.compile()

    def __call__(self, clip: Tensor, masks: Masks) -> float:
        """One step on a normalised clip [B, 3, T, H, W]; the loss, synchronised as theirs is."""
        context, predict = list(masks.context), list(masks.predict)
        mod = "image" if clip.shape[2] == 1 else "video"
        enabled = self.dtype == torch.bfloat16
        with torch.autocast(clip.device.type, dtype=torch.bfloat16, enabled=enabled):
            with stage("target"), torch.no_grad():
                h = self.target([clip], gram_mode=False, training_mode=True)[0]
            with stage("context"):
                z = self.encoder([clip], [context], gram_mode=False, training_mode=True)
            with stage("predictor"):
                z_pred, z_context = self.predictor(z, [context], [predict], mod=mod)
            with stage("loss"):
                with torch.no_grad():
                    parts = h.split(self.width, 2)
                    h = torch.cat([F.layer_norm(c, (self.width,)) for c in parts], 2)
                loss = self._term(z_pred[0], h, predict, None)
                distances = self.mask_distance(
                    [predict], [context], self.grid_side, self.update.offset
                )[0]
                term = self._term(z_context[0], h, context, distances)
                loss = loss + self.update.context_weight * term
        with stage("backward"):
            loss.backward()
        with stage("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        with stage("EMA"), torch.no_grad():
            momentum = self.update.momentum
            target, source = list(self.target.parameters()), list(self.encoder.parameters())
            torch._foreach_mul_(target, momentum)
            torch._foreach_add_(target, source, alpha=1 - momentum)
        return float(loss.detach())

    def _term(
        self, z: Sequence[Tensor], h: Tensor, index: Sequence[Tensor], distances: Any
    ) -> Tensor:
        total = h.new_zeros(())
        for g, (z_g, h_g) in enumerate(
            zip(z, self.apply_masks(h, list(index), concat=False), strict=True)
        ):
            term = (z_g - h_g).abs() ** 1.0
            if distances is not None:
                # Their distances lose a batch of one to a squeeze.
                term = term * (1 / distances[g].reshape(index[g].shape).unsqueeze(2))
            total = total + term.mean()
        return total / len(z)
