"""The official V-JEPA 2.1 step from a checkout given by path: their modules, called as their
trainer calls them.

Nothing of the checkout is copied: this file imports its encoder, predictor, wrappers, mask
distances and mask gathering, and drives them in the order of its training script.
"""

import copy
import importlib
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastjepa.bench.checkout import make_importable

MODULES = "app.vjepa_2_1.models"
# The official names of the sizes whose head count is that of the released models.
OFFICIAL_NAMES = {"vit_giant": "vit_giant_xformers", "vit_gigantic": "vit_gigantic_xformers"}


def import_official(path: Path) -> Callable[[str], Any]:
    """Make a checkout importable; returns `load(module name)`. SystemExit if it is not a
    checkout."""
    try:
        make_importable(path)
    except ValueError as error:
        sys.exit(str(error))
    # Deprecated on CUDA and needless on a CPU, yet opened around every attention call.
    if not torch.cuda.is_available():
        torch.backends.cuda.sdp_kernel = nullcontext  # type: ignore[assignment]
    return importlib.import_module


class OfficialStep:
    """One official training step: same weights, clip and masks as ours, AdamW and EMA as its
    trainer has them."""

    def __init__(
        self, path: Path, *, model: str, size: int, frames: int, pred_depth: int, dtype: torch.dtype
    ) -> None:
        load = import_official(path)
        vit = load(f"{MODULES}.vision_transformer")
        predictor = load(f"{MODULES}.predictor")
        wrappers = load("app.vjepa_2_1.wrappers")
        self.apply_masks = load("src.masks.utils").apply_masks
        self.mask_distance = load(f"{MODULES}.utils.masks_dist").compute_mask_distance
        shape: dict[str, Any] = {
            "img_size": size,
            "num_frames": frames,
            "tubelet_size": 2,
            "use_rope": True,
            "interpolate_rope": True,
            "img_temporal_dim_size": 1,
            "modality_embedding": True,
        }
        encoder = getattr(vit, OFFICIAL_NAMES.get(model, model))(use_sdpa=True, **shape)
        self.width = encoder.embed_dim
        self.encoder = wrappers.MultiSeqWrapper(encoder)
        self.predictor = wrappers.PredictorMultiSeqWrapper(
            predictor.vit_predictor(
                embed_dim=self.width, predictor_embed_dim=384, depth=pred_depth, num_heads=12,
                use_mask_tokens=True, num_mask_tokens=2, return_all_tokens=True, **shape,
            )
        )  # fmt: skip
        self.grid_side, self.dtype = size // 16, dtype

    def load(self, encoder: dict[str, Tensor], predictor: dict[str, Tensor]) -> None:
        """Take ours as initial weights, then make the target and the optimizer."""
        self.encoder.backbone.load_state_dict(encoder)
        self.predictor.backbone.load_state_dict(predictor)
        self.target = copy.deepcopy(self.encoder).requires_grad_(False)
        groups = []
        for decayed in (True, False):
            for module in (self.encoder, self.predictor):
                chosen = [
                    p
                    for n, p in module.named_parameters()
                    if ("bias" in n or p.ndim == 1) != decayed
                ]
                groups.append({"params": chosen, "weight_decay": 0.04 if decayed else 0.0})
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)

    def __call__(
        self, clip: Tensor, context: Sequence[Tensor], predict: Sequence[Tensor],
        *, lr: float, context_weight: float, momentum: float,
    ) -> float:  # fmt: skip
        """One step; the loss, synchronised as theirs is."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        mod = "image" if clip.shape[2] == 1 else "video"
        enabled = self.dtype == torch.bfloat16
        with torch.autocast(clip.device.type, dtype=torch.bfloat16, enabled=enabled):
            with torch.no_grad():
                h = self.target([clip], gram_mode=False, training_mode=True)[0]
                h = torch.cat([F.layer_norm(c, (self.width,)) for c in h.split(self.width, 2)], 2)
            z = self.encoder([clip], [list(context)], gram_mode=False, training_mode=True)
            z_pred, z_context = self.predictor(z, [list(context)], [list(predict)], mod=mod)
            loss = self._term(z_pred[0], h, predict, None)
            distances = self.mask_distance([list(predict)], [list(context)], self.grid_side, False)[
                0
            ]
            loss = loss + context_weight * self._term(z_context[0], h, context, distances)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            target, source = list(self.target.parameters()), list(self.encoder.parameters())
            torch._foreach_mul_(target, momentum)
            torch._foreach_add_(target, source, alpha=1 - momentum)
        return float(loss.detach())

    def _term(
        self, z: Sequence[Tensor], h: Tensor, index: Sequence[Tensor], distances: Any
    ) -> Tensor:
        total = torch.zeros(())
        for g, (z_g, h_g) in enumerate(
            zip(z, self.apply_masks(h, list(index), concat=False), strict=True)
        ):
            term = (z_g - h_g).abs() ** 1.0
            if distances is not None:
                # Their distances lose a batch of one to a squeeze.
                term = term * (1 / distances[g].reshape(index[g].shape).unsqueeze(2))
            total = total + term.mean()
        return total / len(z)
