"""From files to features on disk: `fastjepa features`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastjepa.data.augment import normalise
from fastjepa.data.decoder import DecodeError
from fastjepa.data.manifest import read_manifest
from fastjepa.data.media import load_for_features
from fastjepa.features.extract import extract
from fastjepa.features.writer import FeatureWriter, Form
from fastjepa.model import Encoder


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
    batch: int = 4,
    form: Form = "safetensors",
    overwrite: bool = False,
    device: torch.device | str = "cpu",
) -> Iterator[Extracted]:
    """Write dense features `[T', H', W', D]` of every file; yields an `Extracted` each.

    sources: manifests as in a recipe. levels: block
    indices, the last if None. size: short side in pixels, any multiple of the patch. A file that
    cannot be read is yielded with its reason and no paths, last. Raises ValueError for a bad
    argument, a manifest that is none, or an output that exists.
    """
    chosen = list(encoder.levels[-1:] if levels is None else levels)
    if not chosen or not set(chosen) <= set(encoder.levels):
        raise ValueError(f"levels: expected some of {list(encoder.levels)}, got {chosen}")
    if size % encoder.patch:
        low = size // encoder.patch * encoder.patch
        raise ValueError(
            f"size: {size} is no multiple of the patch {encoder.patch}; "
            f"{max(low, encoder.patch)} or {low + encoder.patch} fits"
        )
    if frames % encoder.tubelet:
        raise ValueError(f"frames: {frames} is no multiple of the tubelet {encoder.tubelet}")
    manifests = [read_manifest(source) for source in sources]
    files = [entry.path for manifest in manifests for entry in manifest]
    writer = FeatureWriter(out, form, overwrite=overwrite)
    names = _names(files)
    for name in names:
        writer.check(name, chosen)
    failed = [(path, f"{path}: {why}") for manifest in manifests for path, why in manifest.bad]

    def inputs() -> Iterator[tuple[str, Tensor]]:
        for name, path in names.items():
            try:
                clip = load_for_features(path, size, frames, fps, patch=encoder.patch)
            except DecodeError as error:
                failed.append((path, str(error)))
                continue
            yield name, normalise(clip)

    for name, features in extract(
        encoder.to(device).features, inputs(), chosen, batch=batch, device=device
    ):
        paths = writer.write(name, features, {"source": names[name]})
        yield Extracted(names[name], paths, tuple(features[chosen[-1]].shape), "")
    for path, reason in failed:
        yield Extracted(path, [], (), reason)


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
