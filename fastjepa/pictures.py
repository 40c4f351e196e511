"""What a run shows at its end: dense features as colours beside the pixels, and the loss curve."""

from pathlib import Path

import torch
from torch import Tensor

from fastjepa.data.augment import normalise
from fastjepa.features.pca import Palette, colour_spread, picture, sheet
from fastjepa.observe.plots import loss_curve
from fastjepa.train.loop import Trainer


@torch.no_grad()
def draw(trainer: Trainer) -> list[tuple[Path, str]]:
    """Write `features.png` and `loss.png` into the run's folder; returns each with a line about it.

    The features are the target encoder's last level (the EMA, which is what a run is for) on the
    first clip of each length and the first image of the run's own data. All ranks call it, the
    first one writes.
    """
    pictures, spreads = [], []
    for stream in trainer.loaders:
        clip = trainer.probe_clip(stream)
        features = _features(trainer, normalise(clip))
        palette = Palette.fit(features)
        pictures.append(
            picture(clip[0].cpu(), features, palette=palette, title=_caption(clip.shape[2]))
        )
        spreads.append(colour_spread(palette.colours(features)))
    if not trainer.engine.ranks.first:
        return []
    features_png, loss_png = trainer.folder / "features.png", trainer.folder / "loss.png"
    sheet(pictures).save(features_png)
    loss_curve(trainer.folder / "metrics.jsonl", loss_png)
    return [
        (
            features_png,
            f"dense features as colours (spread {min(spreads):.2f}; a uniform colour is 0)",
        ),
        (loss_png, "loss curve"),
    ]


def _features(trainer: Trainer, clip: Tensor) -> Tensor:
    """[T', H', W', D] of one clip, on the host."""
    found: list[Tensor] = []
    trainer.engine.measure(lambda: found.append(trainer.jepa.target.features(clip)))
    return found[0][0].float().cpu()


def _caption(frames: int) -> str:
    return "image" if frames == 1 else f"clip of {frames} frames"
