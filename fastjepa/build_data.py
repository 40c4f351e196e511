"""The data's half of the wiring diagram: a recipe to its files, loaders and bad files.

loaders = loaders_of(recipe, share, datasets_of(recipe, resolved), device)
"""

from collections.abc import Iterable, Mapping
from functools import partial

import torch

from fastjepa.config.resolve import Resolved
from fastjepa.config.schema import Recipe, Source
from fastjepa.config.streams import Modality, Stream
from fastjepa.data.cache import Cache, default_folder
from fastjepa.data.decode_dali import DaliDecoder, choose_decoder
from fastjepa.data.files import Files
from fastjepa.data.loader import Loader
from fastjepa.data.manifest import read_manifest
from fastjepa.data.media import decode_media
from fastjepa.data.quarantine import Quarantine
from fastjepa.observe.console import Console
from fastjepa.recipe_parts import mask_maker
from fastjepa.roles import RankShare
from fastjepa.train.ranks import Ranks

# Files known as bad at the start that are named one by one in the log.
_BAD_FILES_SAID = 10
Datasets = Mapping[Modality, list[tuple[Files, float]]]


def datasets_of(recipe: Recipe, resolved: Resolved) -> Datasets:
    """The files of each modality that any rank reads: clips of all lengths come from the same."""
    modalities = {stream.modality: None for stream in resolved.streams.values()}
    return {modality: _datasets(recipe, modality) for modality in modalities}


def _datasets(recipe: Recipe, modality: Modality) -> list[tuple[Files, float]]:
    sources: tuple[Source, ...] = getattr(recipe.data, modality)
    cache = _cache(recipe)
    return [(read_manifest(source.path, cache), source.weight) for source in sources]


def build_loader(recipe: Recipe, stream: Stream, device: torch.device) -> Loader:
    """One stream's loader of a process by itself."""
    return _loader(recipe, stream, _datasets(recipe, stream.modality), device, rank=0, ranks=1)


def _cache(recipe: Recipe) -> Cache:
    chosen = recipe.data.cache
    return Cache(chosen.folder or default_folder(), int(chosen.gib * 2**30))


def loaders_of(
    recipe: Recipe, share: RankShare, datasets: Datasets, device: torch.device
) -> dict[str, Loader]:
    """A loader for each stream that a rank takes."""
    return {
        name: _loader(
            recipe, stream, datasets[stream.modality], device, rank=share.rank, ranks=share.ranks
        )
        for name, stream in share.streams.items()
    }


def _loader(
    recipe: Recipe,
    stream: Stream,
    datasets: list[tuple[Files, float]],
    device: torch.device,
    *,
    rank: int,
    ranks: int,
) -> Loader:
    data = recipe.data
    dali = _dali(recipe, device)
    return Loader(
        datasets=datasets,
        decoder=partial(decode_media, cache=_cache(recipe)),
        batch=stream.clips,
        frames=stream.frames,
        fps=stream.fps,
        crop=stream.crop,
        scale=data.augment.scale,
        aspect=data.augment.aspect,
        flip=data.augment.flip,
        seed=recipe.run.seed,
        stream=stream.number,
        rank=rank,
        ranks=ranks,
        workers=data.workers,
        prefetch=data.prefetch,
        max_bad_share=data.max_bad_share,
        extras=mask_maker(recipe, stream, rank),
        pin_memory=data.pin_memory and device.type == "cuda" and dali is None,
        device_decoder=dali,
    )


def _dali(recipe: Recipe, device: torch.device) -> DaliDecoder | None:
    """None where PyAV decodes, in the workers."""
    choice = choose_decoder(recipe.data.decoder, device).name
    if choice == "pyav":
        return None
    return DaliDecoder(
        device if choice == "dali" else torch.device("cpu"),
        threads=max(1, recipe.data.workers),
        normalised=choice == "dali",
        cache=_cache(recipe),
    )


def quarantine_of(
    recipe: Recipe, manifests: Iterable[Files], num_files: int, console: Console, ranks: Ranks
) -> Quarantine:
    """The run's bad files so far, with those that an index or a broken shard gave at the start.

    Every rank knows what the first one read. Raises TooManyBadFiles, on all of them, also for files
    that were known before.
    """
    known = {path: reason for files in manifests for path, reason in files.bad}
    quarantine = Quarantine(
        recipe.run.folder / "quarantine.jsonl" if ranks.first else None,
        recipe.data.max_bad_share,
        num_files + len(known),
    )
    quarantine.add(ranks.gather(quarantine.files())[0])
    new = quarantine.add(known.items())
    quarantine.check()
    for path, reason in new[:_BAD_FILES_SAID]:
        console.warn(f"left out {path}: {reason}")
    if len(new) > _BAD_FILES_SAID:
        console.warn(f"left out {len(new)} files in all; quarantine.jsonl names each")
    return quarantine
