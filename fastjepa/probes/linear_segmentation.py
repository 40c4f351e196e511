"""Linear segmentation: a class for every pixel by one linear map of the frozen patch features.

The logits of the patches are enlarged to the label's size and compared pixel by pixel. Shapes: C
classes, D channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastjepa.probes.confusion import IGNORED, confusion
from fastjepa.probes.patch_linear import Labelled, PatchLinear, enlarged
from fastjepa.probes.sweep import Samples, Setting, Sweep, grid

RATES, DECAYS = (1.5e-3, 8e-4, 5e-4, 8e-5), (0.1, 0.01, 1e-4)
SETTINGS = grid(RATES, DECAYS)


def segmentation_sweep(
    width: int,
    num_classes: int,
    *,
    settings: Sequence[Setting] = SETTINGS,
    epochs: int = 10,
    batch: int = 16,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Sweep[Labelled]:
    """A head a setting for features of `width` channels; labels are classes, or IGNORED."""
    return Sweep(
        lambda: PatchLinear(width, num_classes).to(device),
        settings,
        segmentation_loss,
        epochs=epochs,
        batch=batch,
        seed=seed,
    )


def segmentation_loss(head: nn.Module, batch: Labelled) -> Tensor:
    """Mean cross-entropy over all pixels of the batch that have a class."""
    total = pixels = torch.zeros(())
    for logits_SCHW, labels_SHW in enlarged(head(batch.features), batch.labels):
        target = labels_SHW.long()
        total = total + cross_entropy(logits_SCHW, target, ignore_index=IGNORED, reduction="sum")
        pixels = pixels + (target != IGNORED).sum()
    return total / pixels.clamp(min=1)


def count(head: nn.Module, samples: Samples[Labelled], num_classes: int, batch: int = 16) -> Tensor:
    """The confusion matrix [C, C] of a head over all samples."""
    counts_CC = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    with torch.inference_mode():
        for index in torch.arange(samples.size).split(batch):
            part = samples.fetch(index)
            for logits_SCHW, labels_SHW in enlarged(head(part.features), part.labels):
                counts_CC += confusion(logits_SCHW.argmax(1), labels_SHW, num_classes).cpu()
    return counts_CC
