"""`fastjepa bench COMMAND`: what is measured, how fast and at what memory. Part of cli.py."""

import os
from pathlib import Path
from typing import Annotated

import typer

from fastjepa.cli_arguments import Overrides, RecipePath

bench_app = typer.Typer(no_args_is_help=True, help="Measure speed and memory.")


@bench_app.command("kernels")
def bench_kernels(
    op: Annotated[
        list[str] | None, typer.Option(help="an op; may be repeated; all if none")
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="a shape, gpu or cpu; may be repeated; what fits the device if none"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="rounds in which each way is timed")] = 7,
    compiled: Annotated[
        bool | None, typer.Option(help="time torch.compile of the formula too; on a GPU, yes")
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="an official V-JEPA 2 checkout; its steps restated if left out"),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="where to write the figures")] = None,
    chart: Annotated[Path | None, typer.Option(help="where to draw them, a .png")] = None,
    compare: Annotated[Path | None, typer.Option(help="figures of an older run")] = None,
) -> None:
    """Time and peak memory of each op beside the plain formula and the official way, and the
    bytes it has to move."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else its profiler says when it starts
    import torch

    from fastjepa.bench.chart import draw
    from fastjepa.bench.kernels import measure
    from fastjepa.bench.official import RESTATED, from_checkout
    from fastjepa.bench.report import as_text, comparison
    from fastjepa.bench.results import load_results
    from fastjepa.bench.shapes import named
    from fastjepa.bench.ways import cases_named
    from fastjepa.build import device_of

    _check_folders(json=json, chart=chart)
    older = None if compare is None else load_results(compare)
    place = device_of(device)
    if threads is not None:
        torch.set_num_threads(threads)
    # How to do it again; paths are of this machine alone.
    settings = [
        *(f"--op {name}" for name in op or []),
        *(f"--shape {name}" for name in shape or []),
        f"--device {place.type} --threads {torch.get_num_threads()} --repeats {repeats}",
        *(["--reference PATH"] if reference else []),
        *(["--compiled"] if compiled else []),
    ]
    results = measure(
        cases_named(op or []),
        named(shape or ["gpu" if place.type == "cuda" else "cpu"]),
        device=place,
        official=RESTATED if reference is None else from_checkout(reference),
        compiled=place.type == "cuda" if compiled is None else compiled,
        repeats=repeats,
        command=" ".join(["fastjepa bench kernels", *settings]),
        say=lambda line: typer.echo(line, err=True),
    )
    if json is not None:
        results.save(json)
    typer.echo(as_text(results))
    if older is not None:
        typer.echo(f"\n{comparison(older, results)}")
    if chart is not None:
        draw(results, chart)


@bench_app.command("data")
def bench_data(
    manifest: Annotated[str, typer.Argument(help="a folder, glob or list of videos")],
    frames: Annotated[int, typer.Option(min=1, help="frames of a clip")] = 16,
    fps: Annotated[float, typer.Option(help="frames a second")] = 4.0,
    crop: Annotated[int, typer.Option(min=1, help="side of a clip in pixels")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="clips a batch")] = 4,
    workers: Annotated[
        int | None, typer.Option(min=1, help="processes; as many as cores if left out")
    ] = None,
    seconds: Annotated[float, typer.Option(help="length of a turn")] = 10.0,
    rounds: Annotated[int, typer.Option(min=1, help="turns of each decoder")] = 5,
    clips_per_second: Annotated[
        float | None, typer.Option(help="what training takes: clips of a step / its seconds")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="an official V-JEPA 2 checkout; needs decord")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="where to write the figures")] = None,
    chart: Annotated[Path | None, typer.Option(help="where to draw them, a .png")] = None,
) -> None:
    """Clips a second of each decoder that works here, all in turn, wrong frames beside them."""
    from fastjepa.bench.data import measure
    from fastjepa.bench.data_report import as_text, draw
    from fastjepa.bench.data_results import Setting
    from fastjepa.data.manifest import read_manifest
    from fastjepa.observe.processes import usable_cores

    _check_folders(json=json, chart=chart)
    files = [entry for entry in read_manifest(manifest) if entry.kind == "video"]
    if not files:
        raise ValueError(f"{manifest}: no videos, nothing to measure")
    setting = Setting(len(files), frames, fps, crop, batch, workers or usable_cores(), seconds)
    settings = [
        f"{manifest if manifest.startswith('package:') else 'MANIFEST'} --frames {frames}",
        f"--fps {fps:g} --crop {crop} --batch {batch} --workers {setting.workers}",
        f"--seconds {seconds:g} --rounds {rounds}",
        *([f"--clips-per-second {clips_per_second:g}"] if clips_per_second else []),
        *(["--reference PATH"] if reference else []),
    ]
    results = measure(
        files,
        setting,
        rounds=rounds,
        target=clips_per_second,
        reference=reference,
        command=" ".join(["fastjepa bench data", *settings]),
        say=lambda line: typer.echo(line, err=True),
    )
    if json is not None:
        results.save(json)
    typer.echo(as_text(results))
    if chart is not None:
        draw(results, chart)


@bench_app.command("step")
def bench_step(
    recipe: RecipePath,
    overrides: Overrides = None,
    sweep: Annotated[
        list[str] | None, typer.Option(help="KEY=V1,V2: each value; may be repeated")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="an official V-JEPA 2 checkout, to take turns with")
    ] = None,
    reference_dtype: Annotated[
        str | None,
        typer.Option(help="float32 or bfloat16; on a CPU float32, else the recipe's, if left out"),
    ] = None,
    compiled: Annotated[bool, typer.Option(help="measure torch.compile's variants too")] = False,
    random_clips: Annotated[
        bool, typer.Option("--random-clips", help="random numbers for clips: no data is needed")
    ] = False,
    memory: Annotated[bool, typer.Option(help="each side's peak, alone in a process")] = True,
    kernels: Annotated[bool, typer.Option(help="count the kernels of a step")] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="timed steps of each side")] = 5,
    json: Annotated[Path | None, typer.Option(help="where to write the figures")] = None,
    chart: Annotated[Path | None, typer.Option(help="where to draw them, a .png")] = None,
    trace: Annotated[Path | None, typer.Option(help="a folder for a Chrome trace each")] = None,
) -> None:
    """A recipe's whole step, stage by stage, beside an official checkout's: speed, share of the
    matrix rate, peak memory, loss."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else its profiler says when it starts
    import torch

    from fastjepa.bench.step_report import as_text, draw
    from fastjepa.bench_step import Setting, measure
    from fastjepa.build import DTYPES

    _check_folders(json=json, chart=chart, trace=trace and trace / "x")
    if reference_dtype not in (None, *DTYPES):
        raise ValueError(f"--reference-dtype {reference_dtype}: expected {' or '.join(DTYPES)}")
    if threads is not None:
        torch.set_num_threads(threads)
    settings = [
        f"{recipe.name} {' '.join(overrides or [])}".rstrip(),
        *(f"--sweep {one}" for one in sweep or []),
        *(["--reference PATH"] if reference else []),
        *([f"--reference-dtype {reference_dtype}"] if reference_dtype else []),
        *(["--compiled"] if compiled else []),
        *(["--random-clips"] if random_clips else []),
        f"--threads {torch.get_num_threads()} --rounds {rounds}",
    ]
    for results in measure(
        Setting(recipe, tuple(overrides or []), reference, reference_dtype, compiled, random_clips),
        sweep or [],
        rounds=rounds,
        command=" ".join(["fastjepa bench step", *settings]),
        say=lambda line: typer.echo(line, err=True),
        memory=memory,
        kernels=kernels,
        trace=trace,
    ):
        if json is not None:
            results.save(json)
    typer.echo(as_text(results))
    if chart is not None:
        draw(results, chart)


def _check_folders(**options: Path | None) -> None:
    for option, path in options.items():
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"--{option} {path}: the folder {path.parent} does not exist")
