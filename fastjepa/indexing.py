"""`fastjepa index`: probe the files of a manifest and write what was found as a Parquet list."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer


def index(
    manifest: Annotated[str, typer.Argument(help="what data.video can name, or an older index")],
    out: Annotated[
        Path | None, typer.Option(help="where to write it; beside the manifest if left out")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="processes; as many as cores if left out")
    ] = None,
    limit: Annotated[float, typer.Option(min=0.1, help="most seconds for one file")] = 120.0,
    retry: Annotated[bool, typer.Option(help="probe unchanged unreadable files again")] = False,
) -> None:
    """Probe every file once: codec, frames, size, and whether it decodes; goes on where an
    interrupted run stopped, and probes only what is new or has changed."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    from fastjepa.data.cache import DEFAULT
    from fastjepa.data.index import (
        files_to_index,
        rows_to_probe,
        states_of,
        take_over,
        write_index,
    )
    from fastjepa.data.probe_notes import ProbeNotes
    from fastjepa.data.probe_pool import probe_all
    from fastjepa.durable import atomic_file
    from fastjepa.observe.processes import usable_cores

    if find_spec("pyarrow") is None:
        raise ValueError("an index needs pyarrow (pip install pyarrow)")
    place = out or _beside(manifest)
    if not place.parent.is_dir():
        raise ValueError(f"--out {place}: the folder {place.parent} does not exist")
    if place.suffix != ".parquet":
        raise ValueError(f"--out {place}: an index is a Parquet file, expected .parquet")
    cache = DEFAULT
    files = files_to_index(manifest, cache)
    with ProbeNotes(place.with_name(f".{place.name}.part")) as notes:
        noted = len(notes)
        if place.exists():
            take_over(notes, place)
        states = states_of(files, cache)
        rows = rows_to_probe(files, states, notes, cache, retry=retry)
        if noted:
            typer.echo(f"an interrupted run left {noted} results", err=True)
        typer.echo(f"{len(files)} files, {len(rows)} to probe", err=True)
        bad = 0
        bar = Progress(
            TextColumn("probed"), BarColumn(), MofNCompleteColumn(), Remaining(),
            TextColumn("{task.fields[bad]} bad"), console=Console(stderr=True),
        )  # fmt: skip
        with bar:
            task = bar.add_task("", total=len(rows), bad=0)
            for row, facts in probe_all(
                ((row, files[row]) for row in rows),
                cache=cache,
                workers=min(workers or usable_cores(), len(rows)),
                limit=limit,
            ):
                notes.add(files[row].path, states[row], vars(facts))
                bad += not facts.readable
                bar.update(task, advance=1, bad=bad)
        with atomic_file(place) as handle:
            summary = write_index(handle, place.parent, files, states, notes)
        notes.remove()
    for line in summary.lines():
        typer.echo(line)
    typer.echo(f"wrote {place}")


def _beside(manifest: str) -> Path:
    """`clips.csv` and the folder `clips` give `clips.index.parquet`; an index gives itself."""
    from fastjepa.data.files import local_path
    from fastjepa.data.index import SUFFIX

    path = local_path(manifest)
    if not path.exists():
        raise ValueError(f"{manifest}: say where to write its index with --out")
    if path.name.endswith(SUFFIX):
        return path
    path = path.resolve() if path.name in ("", "..") else path
    return path.with_name((path.name if path.is_dir() else path.stem) + SUFFIX)
