"""Video object segmentation by label propagation, on data laid out as DAVIS: `fastjepa probe
tracking`.

`JPEGImages/[480p/]NAME/*.jpg`, `Annotations/[480p/]NAME/*.png` (0 background, 1.. objects, 255
left out), and perhaps `ImageSets/2017/val.txt` with the names. Each video's result is kept, so that
a killed probe goes on behind the last one.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fastjepa.data.augment import normalise
from fastjepa.data.media import load_for_features
from fastjepa.durable import write_text
from fastjepa.model import Encoder
from fastjepa.probes.confusion import IGNORED
from fastjepa.probes.davis_metric import boundary, region
from fastjepa.probes.feature_store import View, file_state, named_by, weights_digest
from fastjepa.probes.label_pictures import read_mask
from fastjepa.probes.propagation import propagate
from fastjepa.probes.report import Result, progress


@dataclass(frozen=True)
class Neighbourhood:
    """Which patches a patch takes its labels from (see `propagate`)."""

    context: int = 15
    radius: float = 12.0
    neighbours: int = 5
    temperature: float = 0.2


class Video(NamedTuple):
    """A video as pictures, and the mask of each that has one, by the picture's place."""

    name: str
    frames: list[Path]
    masks: dict[int, Path]


def read_davis(root: Path, names: Path | None = None) -> list[Video]:
    """The videos of a folder, those in the list `names` if given, else in its
    `ImageSets/2017/val.txt`, else all. Raises ValueError naming what is missing."""
    pictures, annotations = (_resolution(root / name) for name in ("JPEGImages", "Annotations"))
    listed = names or root / "ImageSets" / "2017" / "val.txt"
    if names is not None or listed.exists():
        chosen = [line.strip() for line in listed.read_text("utf-8").splitlines() if line.strip()]
    else:
        chosen = sorted(folder.name for folder in annotations.iterdir() if folder.is_dir())
    videos = []
    for name in chosen:
        frames = sorted((pictures / name).glob("*.jpg")) or sorted((pictures / name).glob("*.png"))
        masks = {
            place: mask
            for place, frame in enumerate(frames)
            if (mask := annotations / name / f"{frame.stem}.png").exists()
        }
        if 0 not in masks or len(frames) < 2:
            raise ValueError(
                f"{pictures / name}: expected at least two pictures and a mask of the first in "
                f"{annotations / name}, found {len(frames)} pictures and {len(masks)} masks"
            )
        videos.append(Video(name, frames, masks))
    if not videos:
        raise ValueError(f"{root}: no videos")
    return videos


def probe_tracking(
    encoder: Encoder,
    data: Path,
    out: Path,
    view: View,
    *,
    weights: str,
    names: Path | None = None,
    where: Neighbourhood = Neighbourhood(),
    device: torch.device | str = "cpu",
) -> Result:
    """J and F of masks carried through every video. Writes `out/tracking.json` and a file a video.

    As DAVIS counts: the first and last frames are left out, an object's scores are means over
    frames, the result the mean over all objects. Raises ValueError for data that does not fit.
    """
    view.check(encoder)
    videos = read_davis(data, names)
    facts = {"weights": weights_digest(encoder), **asdict(view), **asdict(where)}
    encoder.to(device)
    parts: dict[str, dict[str, float]] = {}
    with progress("videos", len(videos)) as advance:
        for video in videos:
            file = out / "tracking" / f"{video.name}.json"
            files = [file_state(str(path)) for path in (*video.frames, *video.masks.values())]
            about = {**facts, "files": named_by(files)}
            saved = json.loads(file.read_text("utf-8")) if file.exists() else {}
            if saved.get("facts") != about:
                saved = {"facts": about, "objects": _track(encoder, video, view, where, device)}
                file.parent.mkdir(parents=True, exist_ok=True)
                write_text(file, json.dumps(saved, indent=1) + "\n")
            for number, scores in saved["objects"].items():
                parts[f"{video.name} {number}"] = scores
            advance()
    j, f = (sum(p[key] for p in parts.values()) / len(parts) for key in ("J", "F"))
    result = Result(
        probe="tracking",
        weights=weights,
        setup={"data": str(data), **asdict(view), **asdict(where)},
        scores={"J&F": (j + f) / 2, "J": j, "F": f},
        parts=parts,
    )
    result.save(out / "tracking.json")
    return result


def _track(
    encoder: Encoder,
    video: Video,
    view: View,
    where: Neighbourhood,
    device: torch.device | str,
) -> dict[str, dict[str, float]]:
    """J and F of each object of a video."""
    first = read_mask(str(video.masks[0]))
    first = first.where(first != IGNORED, 0)
    objects = sorted(set(first.unique().tolist()) - {0})
    if not objects:
        raise ValueError(f"{video.masks[0]}: no object on the first frame")
    scores: dict[int, list[tuple[float, float]]] = {number: [] for number in objects}
    maps = propagate(_features(encoder, video, view, device), first, max(objects), **asdict(where))
    for place, chances_OHW in enumerate(maps, 1):
        if place not in video.masks or place == len(video.frames) - 1:
            continue
        true = read_mask(str(video.masks[place]))
        wide = interpolate(
            chances_OHW[None], tuple(true.shape), mode="bilinear", align_corners=False
        )
        counted = true != IGNORED
        found = wide[0].argmax(0).cpu()
        for number, own in scores.items():
            masks = (found == number) & counted, (true == number) & counted
            own.append((region(*masks), boundary(*masks)))
    if not all(scores.values()):
        raise ValueError(
            f"{video.name}: expected a mask of some frame between the first and the last"
        )
    return {
        str(number): {
            name: sum(one[i] for one in own) / len(own) for i, name in enumerate(("J", "F"))
        }
        for number, own in scores.items()
    }


def _features(
    encoder: Encoder, video: Video, view: View, device: torch.device | str
) -> Iterator[Tensor]:
    """Features [H', W', D] of each picture, read as an image."""
    for frame in video.frames:
        clip = load_for_features(str(frame), view.size, 1, view.fps, patch=encoder.patch)
        with torch.inference_mode():
            yield encoder.features(normalise(clip)[None].to(device), [view.level])[0][0, 0]


def _resolution(folder: Path) -> Path:
    """DAVIS keeps a folder a resolution below; 480p is the one that is scored."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected the layout of DAVIS")
    below = folder / "480p"
    return below if below.is_dir() else folder
