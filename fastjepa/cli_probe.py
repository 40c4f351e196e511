"""`fastjepa probe COMMAND`: what frozen features know, by the field's protocols. Part of cli.py."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fastjepa.model import Encoder
    from fastjepa.probes.feature_store import View
    from fastjepa.probes.report import Result

probe_app = typer.Typer(no_args_is_help=True, help="Measure what frozen features know.")

Weights = Annotated[str, typer.Argument(help="whatever `fastjepa.load` takes")]
Train = Annotated[str, typer.Argument(help="files with labels to learn from (docs/probes.md)")]
Test = Annotated[str, typer.Argument(help="files with labels to be judged on")]
Out = Annotated[Path, typer.Option(help="folder for features, heads and the result")]
Level = Annotated[int | None, typer.Option(help="block index; the last if left out")]
Size = Annotated[int, typer.Option(help="short side in pixels")]
Frames = Annotated[int, typer.Option(help="frames of a video's clip")]
Fps = Annotated[float, typer.Option(help="frames a second")]
Segments = Annotated[int, typer.Option(min=1, help="clips of a video, evenly placed")]
Batch = Annotated[int, typer.Option(min=1, help="clips at once through the encoder")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]
Holdout = Annotated[
    float, typer.Option(help="share of the training files that settings are chosen on")
]
Seed = Annotated[int, typer.Option(help="of the heads, their batches and the held-out part")]
Epochs = Annotated[int, typer.Option(min=1, help="epochs of the heads")]
HeadBatch = Annotated[int, typer.Option(min=1, help="samples of a head's step")]
Lr = Annotated[
    list[float] | None, typer.Option(help="a learning rate; may be repeated; the field's if none")
]
Decay = Annotated[
    list[float] | None, typer.Option(help="a weight decay; may be repeated; the field's if none")
]


@probe_app.command("knn")
def probe_knn(
    weights: Weights,
    train: Train,
    test: Test,
    out: Out = Path("probes"),
    k: Annotated[
        list[int] | None, typer.Option(min=1, help="may be repeated; 1 to 200 if none")
    ] = None,
    temperature: Annotated[float, typer.Option(help="of the neighbours' votes")] = 0.07,
    level: Level = None,
    size: Size = 256,
    frames: Frames = 16,
    fps: Fps = 4.0,
    segments: Segments = 1,
    batch: Batch = 8,
    holdout: Holdout = 0.1,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Classes by the nearest neighbours of mean features."""
    from fastjepa.probes.feature_store import View
    from fastjepa.probes.knn import KS
    from fastjepa.probes.run_classification import probe_knn as run

    def probe(encoder: "Encoder", place: Any) -> "Result":
        view = View(_level(encoder, level), size, frames, fps, segments, square=True, pool=True)
        return run(
            encoder, train, test, out, view, weights=weights, ks=k or KS, temperature=temperature,
            holdout=holdout, batch=batch, seed=seed, device=place,
        )  # fmt: skip

    _run(weights, device, probe)


@probe_app.command("attentive")
def probe_attentive(
    weights: Weights,
    train: Train,
    test: Test,
    out: Out = Path("probes"),
    lr: Lr = None,
    weight_decay: Decay = None,
    epochs: Epochs = 20,
    head_batch: HeadBatch = 32,
    level: Level = None,
    size: Size = 256,
    frames: Frames = 16,
    fps: Fps = 4.0,
    segments: Segments = 1,
    batch: Batch = 8,
    holdout: Holdout = 0.1,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Classes by attention over all features, 20 heads at once."""
    from fastjepa.probes.attentive import DECAYS, RATES
    from fastjepa.probes.feature_store import View
    from fastjepa.probes.run_classification import probe_attentive as run
    from fastjepa.probes.sweep import grid

    def probe(encoder: "Encoder", place: Any) -> "Result":
        view = View(_level(encoder, level), size, frames, fps, segments, square=True)
        return run(
            encoder, train, test, out, view, weights=weights,
            settings=grid(lr or RATES, weight_decay or DECAYS), epochs=epochs,
            head_batch=head_batch, holdout=holdout, batch=batch, seed=seed, device=place,
        )  # fmt: skip

    _run(weights, device, probe)


@probe_app.command("segmentation")
def probe_segmentation(
    weights: Weights,
    train: Train,
    test: Test,
    out: Out = Path("probes"),
    classes: Annotated[
        int | None, typer.Option(min=2, help="how many; as the training masks have if left out")
    ] = None,
    ignore: Annotated[int | None, typer.Option(help="a label to leave out, beside 255")] = None,
    lr: Lr = None,
    weight_decay: Decay = None,
    epochs: Epochs = 10,
    head_batch: HeadBatch = 16,
    level: Level = None,
    size: Size = 512,
    batch: Batch = 8,
    holdout: Holdout = 0.1,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """A class for every pixel by one linear map (mIoU)."""
    from fastjepa.probes.linear_segmentation import DECAYS, RATES
    from fastjepa.probes.run_dense import probe_segmentation as run
    from fastjepa.probes.sweep import grid

    def probe(encoder: "Encoder", place: Any) -> "Result":
        return run(
            encoder, train, test, out, _picture(encoder, level, size), weights=weights,
            num_classes=classes, ignore=ignore,
            settings=grid(lr or RATES, weight_decay or DECAYS), epochs=epochs,
            head_batch=head_batch, holdout=holdout, batch=batch, seed=seed, device=place,
        )  # fmt: skip

    _run(weights, device, probe)


@probe_app.command("depth")
def probe_depth(
    weights: Weights,
    train: Train,
    test: Test,
    out: Out = Path("probes"),
    low: Annotated[float, typer.Option(help="metres; nearer pixels are left out")] = 0.001,
    high: Annotated[float, typer.Option(help="metres; farther pixels are left out")] = 10.0,
    unit: Annotated[float, typer.Option(help="metres that a label picture's 1 stands for")] = 0.001,
    lr: Lr = None,
    weight_decay: Decay = None,
    epochs: Epochs = 10,
    head_batch: HeadBatch = 16,
    level: Level = None,
    size: Size = 512,
    batch: Batch = 8,
    holdout: Holdout = 0.1,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Metres for every pixel by one linear map to bins (RMSE)."""
    from fastjepa.probes.linear_depth import DECAYS, RATES
    from fastjepa.probes.run_dense import probe_depth as run
    from fastjepa.probes.sweep import grid

    def probe(encoder: "Encoder", place: Any) -> "Result":
        return run(
            encoder, train, test, out, _picture(encoder, level, size), weights=weights,
            low=low, high=high, unit=unit, settings=grid(lr or RATES, weight_decay or DECAYS),
            epochs=epochs, head_batch=head_batch, holdout=holdout, batch=batch, seed=seed,
            device=place,
        )  # fmt: skip

    _run(weights, device, probe)


@probe_app.command("tracking")
def probe_tracking(
    weights: Weights,
    data: Annotated[Path, typer.Argument(help="a folder laid out as DAVIS (docs/probes.md)")],
    out: Out = Path("probes"),
    names: Annotated[
        Path | None, typer.Option(help="a list of videos; ImageSets/2017/val.txt if left out")
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="last frames that labels come from")] = 15,
    radius: Annotated[float, typer.Option(help="in patches, how far they may come")] = 12.0,
    neighbours: Annotated[int, typer.Option(min=1, help="patches that give a label")] = 5,
    temperature: Annotated[float, typer.Option(help="of their weights")] = 0.2,
    level: Level = None,
    size: Size = 480,
    device: Device = "auto",
) -> None:
    """The first frame's masks carried through a video by features alone (J and F)."""
    from fastjepa.probes.run_tracking import Neighbourhood
    from fastjepa.probes.run_tracking import probe_tracking as run

    def probe(encoder: "Encoder", place: Any) -> "Result":
        return run(
            encoder, data, out, _picture(encoder, level, size), weights=weights, names=names,
            where=Neighbourhood(context, radius, neighbours, temperature), device=place,
        )  # fmt: skip

    _run(weights, device, probe)


def _run(weights: str, device: str, probe: Callable[["Encoder", Any], "Result"]) -> None:
    from fastjepa.build import device_of
    from fastjepa.pretrained import load

    place = device_of(device)
    for line in probe(load(weights, device=place), place).lines():
        typer.echo(line)


def _picture(encoder: "Encoder", level: int | None, size: int) -> "View":
    from fastjepa.probes.feature_store import View

    return View(_level(encoder, level), size, frames=encoder.tubelet)


def _level(encoder: "Encoder", level: int | None) -> int:
    return encoder.levels[-1] if level is None else level
