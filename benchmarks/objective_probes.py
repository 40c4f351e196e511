"""What frozen features know of moving digits, whose every label is known: the probes of
objective_ablation.py.

Probes are fitted on clips of one half of the digit images (`fit`) and choose their one setting, k
or alpha, on other clips of that half (`choose`). The figures are of clips of the other images
(`test`), on which nothing is chosen.

Shapes: S clips of two digits, T frames, H and W pixels, T', H', W' grid, D channels.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastjepa.data.augment import normalise
from fastjepa.data.moving_digits import MovingDigits
from fastjepa.model import Encoder
from fastjepa.probes.confusion import confusion, mean_iou
from fastjepa.probes.knn import accuracy, knn
from fastjepa.probes.linear_segmentation import segmentation_sweep
from fastjepa.probes.patch_linear import Labelled, enlarged, in_memory
from fastjepa.probes.sweep import Samples, Setting

SETTING, EPOCHS, BATCH = Setting(lr=3e-2, weight_decay=1e-3), 16, 16
ALPHAS = tuple(10.0**power for power in range(-1, 5))
FRAME = 2  # the frame whose mask is to be found

Scores = dict[str, float]


class Part(NamedTuple):
    """Clips of one purpose.

    `clips` uint8 [S, 3, T, H, W]; `masks` uint8 [S, T, H, W], 1 + class; `classes` [S, 2];
    `covers` float [S, 2, T', H', W'], how much of a patch each digit covers; `velocities` float
    [S, 2, T', 2] of each digit in each step, pixels a second.
    """

    clips: Tensor
    masks: Tensor
    classes: Tensor
    covers: Tensor
    velocities: Tensor


class _Draw(NamedTuple):
    split: Literal["train", "test"]
    seed: int
    clips: int


DRAWS = {
    "fit": _Draw("train", 101, 288),
    "choose": _Draw("train", 102, 96),
    "test": _Draw("test", 103, 224),
}


def make_parts(source: MovingDigits, patch: int, tubelet: int, file: Path) -> dict[str, Part]:
    """The three parts, clips as `source` makes them, for a patch and a tubelet; kept in `file`."""
    if not file.exists():
        made = {name: _make(source, draw, patch, tubelet)._asdict() for name, draw in DRAWS.items()}
        torch.save(made, file)
    saved = torch.load(file, weights_only=True)
    return {name: Part(**saved[name]) for name in DRAWS}


def _make(source: MovingDigits, draw: _Draw, patch: int, tubelet: int) -> Part:
    source = replace(source, split=draw.split, seed=draw.seed)
    clips = [source[number] for number in range(draw.clips)]
    instances = torch.from_numpy(np.stack([clip.instance for clip in clips]))
    own = torch.stack([instances == 1 + digit for digit in range(source.num_digits)], 1).float()
    cut = own.unfold(2, tubelet, tubelet).unfold(3, patch, patch).unfold(4, patch, patch)
    velocities = torch.from_numpy(np.stack([clip.velocities for clip in clips])).float()
    frames = torch.from_numpy(np.stack([clip.frames for clip in clips]))
    return Part(
        clips=frames.permute(0, 4, 1, 2, 3).contiguous(),
        masks=torch.from_numpy(np.stack([clip.mask for clip in clips])),
        classes=torch.from_numpy(np.stack([clip.digits for clip in clips])),
        covers=cut.mean((5, 6, 7)),
        velocities=velocities.transpose(1, 2).unflatten(2, (-1, tubelet)).mean(3),
    )


def measure(encoder: Encoder, parts: Mapping[str, Part], *, images: bool) -> dict[str, Scores]:
    """Every probe on the last and on an intermediate level: scores by the level's name.

    A single picture goes through the image tokenizer if `images`, else as a still clip.
    """
    levels = {"last": encoder.levels[-1], "intermediate": encoder.levels[1]}
    clips: dict[str, dict[str, Tensor]] = {name: {} for name in levels}
    stills: dict[str, dict[str, Tensor]] = {name: {} for name in levels}
    for name, part in parts.items():
        still = part.clips[:, :, FRAME : FRAME + 1]
        if not images:
            still = still.expand(-1, -1, encoder.tubelet, -1, -1)
        for found, of in ((clips, part.clips), (stills, still)):
            for level, x in zip(levels, _features(encoder, of, list(levels.values())), strict=True):
                found[level][name] = x
    step = FRAME // encoder.tubelet
    return {
        level: {
            "miou": _segmentation({name: x[:, step] for name, x in own.items()}, parts),
            "miou_picture": _segmentation({n: x[:, 0] for n, x in stills[level].items()}, parts),
            "knn": _nearest(own, parts),
            "velocity_r2": _velocity(own, parts),
        }
        for level, own in clips.items()
    }


def _features(encoder: Encoder, clips: Tensor, levels: list[int]) -> list[Tensor]:
    """Features [S, T', H', W', D] of each level."""
    with torch.inference_mode():
        parts = [encoder.features(normalise(part), levels) for part in clips.split(32)]
    return [torch.cat(level).clone() for level in zip(*parts, strict=True)]


def _segmentation(x_SHWD: Mapping[str, Tensor], parts: Mapping[str, Part]) -> float:
    """mIoU of digits and background on one frame, every second pixel of every second row.

    Nine pixels of ten are background, so that a weak head is never sure of a digit: where the
    head's margin counts as one is chosen on `choose`.
    """
    samples = {
        name: in_memory(x_SHWD[name], (part.masks[:, FRAME, ::2, ::2] > 0).long())
        for name, part in parts.items()
    }
    width = x_SHWD["fit"].shape[-1]
    sweep = segmentation_sweep(width, 2, settings=[SETTING], epochs=EPOCHS, batch=BATCH)
    sweep.train(samples["fit"])
    margin, digit = _margins(sweep.heads[0], samples["choose"])
    limits = margin.quantile(torch.linspace(0.5, 0.999, 200))
    best = max(limits, key=lambda limit: mean_iou(confusion(margin > limit, digit, 2)))
    margin, digit = _margins(sweep.heads[0], samples["test"])
    return mean_iou(confusion(margin > best, digit, 2))


def _margins(head: nn.Module, samples: Samples[Labelled]) -> tuple[Tensor, Tensor]:
    """By how much each pixel's logit of a digit is above that of the background; its label."""
    everything = samples.fetch(torch.arange(samples.size))
    with torch.inference_mode():
        found = list(enlarged(head(everything.features), everything.labels))
    margins = [(logits[:, 1] - logits[:, 0]).flatten() for logits, _ in found]
    return torch.cat(margins), torch.cat([labels.flatten() for _, labels in found])


def _nearest(x_STHWD: Mapping[str, Tensor], parts: Mapping[str, Part]) -> float:
    """Accuracy of a digit's class by k-NN, its features the mean over its patches in the clip."""
    found = {}
    for name, part in parts.items():
        total = torch.einsum("snthw,sthwd->snd", part.covers, x_STHWD[name])
        seen = part.covers.sum((2, 3, 4)) > 0  # cosine similarity needs no division by it
        found[name] = total[seen], part.classes[seen]
    choices = knn(*found["fit"], found["choose"][0])
    k = max(choices, key=lambda k: accuracy(choices[k], found["choose"][1]))
    return accuracy(knn(*found["fit"], found["test"][0], ks=[k])[k], found["test"][1])


def _velocity(x_STHWD: Mapping[str, Tensor], parts: Mapping[str, Part]) -> float:
    """R2 of a digit's velocity in a time step, by ridge regression from its patches' mean."""
    from sklearn.linear_model import Ridge
    from sklearn.metrics import r2_score
    from sklearn.preprocessing import StandardScaler

    found = {}
    for name, part in parts.items():
        total = torch.einsum("snthw,sthwd->sntd", part.covers, x_STHWD[name])
        weight = part.covers.sum((3, 4))
        seen = weight > 0
        found[name] = (total[seen] / weight[seen][:, None]).numpy(), part.velocities[seen].numpy()
    scaler = StandardScaler().fit(found["fit"][0])

    def score(model: Ridge, name: str) -> float:
        x, velocity = found[name]
        return float(r2_score(velocity, model.predict(scaler.transform(x))))

    x, velocity = scaler.transform(found["fit"][0]), found["fit"][1]
    models = [Ridge(alpha=alpha).fit(x, velocity) for alpha in ALPHAS]
    return score(max(models, key=lambda model: score(model, "choose")), "test")
