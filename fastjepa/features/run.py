"""From files to features on disk, or on a page: `fastjepa features` and `fastjepa explore`."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastjepa.data.augment import normalise
from fastjepa.data.decoder import DecodeError
from fastjepa.data.files import kind_of
from fastjepa.data.manifest import read_manifest
from fastjepa.data.media import load_for_features, stream_for_features
from fastjepa.durable import atomic_file
from fastjepa.features.explorer import write_page
from fastjepa.features.extract import extract
from fastjepa.features.pca import picture as pca_picture
from fastjepa.features.pca_video import write_pca_video
from fastjepa.features.windows import Blend, windows
from fastjepa.features.writer import FeatureWriter, Form
from fastjepa.model import Encoder

# About the longer side of a frame in a picture, in pixels.
_CELL = 240


class Extracted(NamedTuple):
    """One file's outcome: what was written and the shape, or why it could not be read."""

    source: str
    paths: list[Path]
    shape: tuple[int, ...]
    reason: str


def extract_files(
    encoder: Encoder,
    sources: Sequence[str],
    out: Path,
    *,
    levels: Sequence[int] | None = None,
    size: int = 256,
    frames: int = 16,
    fps: float = 4.0,
    start: float = 0.0,
    batch: int = 4,
    form: Form = "safetensors",
    overlap: int | None = None,
    video: bool = False,
    picture: bool = False,
    overwrite: bool = False,
    device: torch.device | str = "cpu",
) -> Iterator[Extracted]:
    """Write dense features `[T', H', W', D]` of every file; yields an `Extracted` each.

    sources: manifests as in a recipe. levels: block indices, the last if None. size: short side in
    pixels, any multiple of the patch. Of a video `frames` are read from `start` on (0 to 1, which
    is as late as they fit), or, with an `overlap` in frames, all of it in windows of `frames` that
    overlap and are blended. `video` adds `NAME.pca.mp4` for each video: pixels beside features of
    the last of `levels` as colours; `picture` adds `NAME.pca.png`: of `frames` frames, a row of
    colours for each level. A file that cannot be read is yielded with its reason and no paths,
    last. Raises ValueError for a bad argument, a manifest that is none, or an output that exists.
    """
    chosen = list(encoder.levels[-1:] if levels is None else levels)
    _check(encoder, chosen, size, frames, fps, start)
    if overlap is not None and start:
        raise ValueError(f"start: {start:g}, but with an overlap the whole video is read")
    if overlap is not None and (overlap % encoder.tubelet or not 0 <= overlap < frames):
        raise ValueError(
            f"overlap: {overlap}; expected a multiple of the tubelet {encoder.tubelet} from 0 to "
            f"below frames ({frames})"
        )
    manifests = [read_manifest(source) for source in sources]
    files = [entry.path for manifest in manifests for entry in manifest]
    writer = FeatureWriter(out, form, overwrite=overwrite)
    names = _names(files)
    for name in names:
        writer.check(name, chosen)
        if video:
            writer.check_file(_video(out, name))
        if picture:
            writer.check_file(_picture(out, name))
    failed = [(path, f"{path}: {why}") for manifest in manifests for path, why in manifest.bad]
    blends = {name: Blend() for name in names}

    def first_clip(path: str) -> Tensor:
        return load_for_features(path, size, frames, fps, patch=encoder.patch, start_fraction=start)

    def clips(path: str) -> Iterator[tuple[int, Tensor, bool]]:
        if overlap is None:
            yield 0, first_clip(path), True
        else:
            pictures = stream_for_features(path, size, fps, patch=encoder.patch)
            yield from windows(pictures, frames, overlap, encoder.tubelet)

    def inputs() -> Iterator[tuple[tuple[str, int], Tensor]]:
        for name, path in names.items():
            try:
                for number, (first, clip, last) in enumerate(clips(path), 1):
                    if last:
                        blends[name].expect(number)
                    yield (name, first), normalise(clip)
            except DecodeError as error:
                failed.append((path, str(error)))
                del blends[name]

    encode = encoder.to(device).features
    for (name, first), part in extract(encode, inputs(), chosen, batch=batch, device=device):
        # Some windows of a file that broke later may still come.
        if name not in blends or not blends[name].add(first, part):
            continue
        features, path = blends.pop(name).result(), names[name]
        paths = writer.write(name, features, {"source": path})
        whole = features[chosen[-1]]
        if video and kind_of(path) == "video":
            pictures = (
                iter(first_clip(path).transpose(0, 1).numpy())
                if overlap is None
                else stream_for_features(path, size, fps, patch=encoder.patch)
            )
            write_pca_video(_video(out, name), pictures, whole, fps=fps, tubelet=encoder.tubelet)
            paths.append(_video(out, name))
        if picture:
            clip = first_clip(path)
            # Windows of a video shorter than `frames` have its own frames alone.
            steps = min(len(whole), max(1, clip.shape[1] // encoder.tubelet))
            rows = {f"block {level}": features[level][:steps] for level in chosen}
            shown = clip[:, : steps * encoder.tubelet]
            with atomic_file(_picture(out, name)) as file:
                pca_picture(shown, rows, cell=_CELL).save(file, format="png", optimize=True)
            paths.append(_picture(out, name))
        yield Extracted(path, paths, tuple(whole.shape), "")
    for path, reason in failed:
        yield Extracted(path, [], (), reason)


def explore_file(
    encoder: Encoder,
    source: str,
    out: Path,
    *,
    level: int | None = None,
    size: int = 256,
    frames: int = 16,
    fps: float = 4.0,
    start: float = 0.0,
) -> tuple[int, ...]:
    """Write the similarity explorer of one file as the page `out`; returns its features' shape.

    source: a manifest of one video or image. level: a block index, the last if None. Of a video
    `frames` are read from `start` on (0 to 1, which is as late as they fit). Raises ValueError for
    a bad argument, a file that cannot be read and an `out` that exists.
    """
    chosen = encoder.levels[-1] if level is None else level
    _check(encoder, [chosen], size, frames, fps, start)
    if out.exists():
        raise ValueError(f"--out {out}: exists already; choose another name")
    files = [entry.path for entry in read_manifest(source)]
    if len(files) != 1:
        raise ValueError(f"{source}: holds {len(files)} files, expected one video or image")
    clip = load_for_features(files[0], size, frames, fps, patch=encoder.patch, start_fraction=start)
    device = encoder.patch_embed.proj.weight.device
    with torch.inference_mode():
        features = encoder.features(normalise(clip.to(device))[None], [chosen])[0][0].float().cpu()
    out.parent.mkdir(parents=True, exist_ok=True)
    name, grid = Path(files[0]).name, " x ".join(map(str, features.shape[:3]))
    about = f"{encoder.origin}, block {chosen}: {grid} patches of {features.shape[3]} channels"
    write_page(out, clip, features, title=f"Similarity explorer: {name}", about=about)
    return tuple(features.shape)


def _check(
    encoder: Encoder, levels: Sequence[int], size: int, frames: int, fps: float, start: float
) -> None:
    if not levels or not set(levels) <= set(encoder.levels):
        raise ValueError(f"levels: expected some of {list(encoder.levels)}, got {list(levels)}")
    if size < 1 or size % encoder.patch:
        low = max(0, size) // encoder.patch * encoder.patch
        raise ValueError(
            f"size: {size} is no multiple of the patch {encoder.patch}; "
            f"{max(low, encoder.patch)} or {low + encoder.patch} fits"
        )
    if frames < 1 or frames % encoder.tubelet:
        raise ValueError(f"frames: {frames} is no multiple of the tubelet {encoder.tubelet}")
    if not 0.0 < fps < math.inf:
        raise ValueError(f"fps: {fps:g}, expected a number above 0")
    if not 0.0 <= start <= 1.0:
        raise ValueError(f"start: {start:g}, expected a share from 0 to 1")


def _video(out: Path, name: str) -> Path:
    return out / f"{name}.pca.mp4"


def _picture(out: Path, name: str) -> Path:
    return out / f"{name}.pca.png"


def _names(files: Sequence[str]) -> dict[str, str]:
    """One output name a file: its stem, with a number behind it where two files share one."""
    names: dict[str, str] = {}
    for path in files:
        stem = name = Path(path).stem
        number = 1
        while name in names:
            number += 1
            name = f"{stem}-{number}"
        names[name] = path
    return names
