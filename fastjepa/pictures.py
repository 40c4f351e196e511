"""What a run shows at its end: dense features as colours beside the pixels, and the loss curve."""

from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from fastjepa.data.augment import as_pixels, normalise
from fastjepa.features.pca import Palette, colour_spread, picture, sheet
from fastjepa.observe.plots import loss_curve
from fastjepa.train.loop import Trainer


@torch.no_grad()
def draw(trainer: Trainer) -> list[tuple[Path, str]]:
    """Write `features.png` and `loss.png` into the run's folder; returns each with a line about it.

    All ranks call it, the first one writes.
    """
    features, spread = feature_sheet(trainer, trainer.probe_clips())
    if not trainer.engine.ranks.first:
        return []
    features_png, loss_png = trainer.folder / "features.png", trainer.folder / "loss.png"
    features.save(features_png)
    loss_curve(trainer.folder / "metrics.jsonl", loss_png)
    return [
        (
            features_png,
            f"dense features as colours (spread {spread:.2f}; a uniform colour is 0)",
        ),
        (loss_png, "loss curve"),
    ]


@torch.no_grad()
def feature_sheet(trainer: Trainer, clips: Iterable[Tensor]) -> tuple[Image.Image, float]:
    """Clips [1, 3, T, H, W] of the run beside their features as colours, and the least spread.

    The features are the target encoder's last level (the EMA, which is what a run is for). All
    ranks call it.
    """
    pictures, spreads = [], []
    for clip in clips:
        features = _features(trainer, normalise(clip))
        palette = Palette.fit(features)
        pixels = as_pixels(clip)[0].cpu()
        pictures.append(picture(pixels, features, palette=palette, title=_caption(clip.shape[2])))
        spreads.append(colour_spread(palette.colours(features)))
    return sheet(pictures), min(spreads)


def _features(trainer: Trainer, clip: Tensor) -> Tensor:
    """[T', H', W', D] of one clip, on the host."""
    found: list[Tensor] = []
    trainer.engine.measure(lambda: found.append(trainer.jepa.target.features(clip)))
    return found[0][0].float().cpu()


def _caption(frames: int) -> str:
    return "image" if frames == 1 else f"clip of {frames} frames"
