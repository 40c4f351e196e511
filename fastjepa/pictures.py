"""What a run shows at its end: dense features as colours beside the pixels, and the loss curve."""

from pathlib import Path

import torch
from torch import Tensor

from fastjepa.data.batch import BatchSource
from fastjepa.features.pca import Palette, colour_spread, picture, sheet
from fastjepa.observe.plots import loss_curve
from fastjepa.train.loop import Trainer

CAPTIONS = {"video": "clip", "image": "image"}


@torch.no_grad()
def draw(trainer: Trainer) -> list[tuple[Path, str]]:
    """Write `features.png` and `loss.png` into the run's folder; returns each with a line about it.

    The features are the target encoder's last level (the EMA, which is what a run is for) on the
    first clip and the first image of the run's own data.
    """
    shown = []
    for modality, loader in trainer.loaders.items():
        pixels = _first_clip(loader)
        features = trainer.jepa.target.features(trainer.probe_clip(modality))[0][0].cpu()
        shown.append((modality, pixels, features))
    palettes = [Palette.fit(features) for _, _, features in shown]
    pictures = [
        picture(pixels, features, palette=palette, title=CAPTIONS[modality])
        for (modality, pixels, features), palette in zip(shown, palettes, strict=True)
    ]
    spread = min(
        colour_spread(palette.colours(features))
        for (_, _, features), palette in zip(shown, palettes, strict=True)
    )
    features_png, loss_png = trainer.folder / "features.png", trainer.folder / "loss.png"
    sheet(pictures).save(features_png)
    loss_curve(trainer.folder / "metrics.jsonl", loss_png)
    return [
        (features_png, f"dense features as colours (spread {spread:.2f}; a uniform colour is 0)"),
        (loss_png, "loss curve"),
    ]


def _first_clip(loader: BatchSource) -> Tensor:
    return loader.batch_at(0).clip[0]
