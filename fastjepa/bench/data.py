"""`fastjepa bench data`: clips a second of each decoder that works here, all in turn.

results = measure(read_manifest("clips/"), setting, rounds=5, ...)
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastjepa.bench.data_official import count_wrong, official_clips
from fastjepa.bench.data_results import Results, Setting, Way
from fastjepa.bench.data_speed import in_turn
from fastjepa.bench.data_stages import stages
from fastjepa.bench.machine import commit, device_facts, versions
from fastjepa.bench.official import commit_of
from fastjepa.data.augment import normalise
from fastjepa.data.decode_dali import DaliDecoder, why_not
from fastjepa.data.encode import encodable
from fastjepa.data.files import Entry
from fastjepa.data.frame_identity import FrameCount, count_wrong_frames
from fastjepa.data.loader import Loader
from fastjepa.data.numbered import write_numbered

_PREFETCH = 2
# Clips of which the CPU time is taken apart by stage.
_STAGE_CLIPS = 32


def measure(
    files: Sequence[Entry],
    setting: Setting,
    *,
    rounds: int,
    target: float | None,
    reference: Path | None,
    command: str,
    say: Callable[[str], None],
) -> Results:
    """Count wrong frames on numbered videos, then time the loaders in turn on `files`.

    Every loader's clips end as normalised float32. `reference` is an official checkout, whose
    loader takes turns too; `say` hears what is being done.
    """
    settings: dict[str, Any] = {
        "batch": setting.batch,
        "frames": setting.frames,
        "fps": setting.fps,
        "crop": setting.crop,
        "scale": (0.3, 1.0),
        "aspect": (0.75, 1.35),
        "flip": 0.5,
        "seed": 0,
    }
    decoders = _decoders(setting.workers)
    loaders: dict[str, Callable[[], Iterator[Tensor]]] = {
        name: partial(_ours, files, settings, setting.workers, decoder)
        for name, decoder in decoders.items()
    }
    if reference is not None:
        paths = [entry.path for entry in files]
        loaders["official"] = partial(official_clips, reference, paths, setting)
    say("counting wrong frames of numbered videos")
    counts = _wrong_frames(decoders, reference)
    say("taking the CPU time of a clip apart")
    found = stages(files, max(1, _STAGE_CLIPS // setting.batch), settings)
    say(f"timing {', '.join(loaders)} in {rounds} turns of {setting.seconds:g} s each")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what normalises here would take the workers' cores
    try:
        turns, held = in_turn(
            loaders, seconds=setting.seconds, ready=_PREFETCH * setting.workers, rounds=rounds
        )
    finally:
        torch.set_num_threads(threads)
    return Results(
        command=command,
        commit=commit(),
        device=device_facts(torch.device("cpu")),
        versions=versions("torch", "av", "nvidia-dali-cuda130", "eva-decord", "fastjepa"),
        reference="" if reference is None else f"checkout {commit_of(reference)}",
        setting=setting,
        ways={
            name: Way(turns[name], held[name], counts[name].looked_at.total(), counts[name].wrong)
            for name in loaders
        },
        stages=found,
        target=target,
    )


def _decoders(threads: int) -> dict[str, DaliDecoder | None]:
    """By name; None is the loader's own, by PyAV."""
    found: dict[str, DaliDecoder | None] = {"pyav": None}
    if why_not() is None:
        found["dali-cpu"] = DaliDecoder(torch.device("cpu"), threads=threads, normalised=True)
        if torch.cuda.is_available():
            found["dali"] = DaliDecoder(torch.device("cuda"), threads=threads, normalised=True)
    return found


def _ours(
    files: Sequence[Entry], settings: dict[str, Any], workers: int, decoder: DaliDecoder | None
) -> Iterator[Tensor]:
    loader = Loader(
        **settings,
        datasets=[(files, 1.0)],
        workers=workers,
        prefetch=_PREFETCH,
        device_decoder=decoder,
    )
    for batch in loader.batches(0, 2**30):
        yield batch.clip if batch.clip.is_floating_point() else normalise(batch.clip)


def _wrong_frames(
    decoders: Mapping[str, DaliDecoder | None], reference: Path | None
) -> dict[str, FrameCount]:
    with tempfile.TemporaryDirectory() as folder:
        videos = [
            write_numbered(Path(folder), number, codec=codec)
            for number, codec in enumerate(encodable())
        ]
        counts = {
            name: count_wrong_frames(videos, partial(Loader, device_decoder=decoder))
            for name, decoder in decoders.items()
        }
        if reference is not None:
            counts["official"] = count_wrong(reference, videos, 8)
    return counts
