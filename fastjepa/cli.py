"""The command line: `fastjepa COMMAND --help`. A mistake of the user is one line and exit code
2."""

import os
import shlex
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from fastjepa.cli_arguments import Overrides, RecipePath
from fastjepa.cli_bench import bench_app
from fastjepa.cli_plan import plan
from fastjepa.cli_probe import probe_app
from fastjepa.cli_weights import explore, export, features, models
from fastjepa.indexing import index
from fastjepa.observe.processes import usable_cores

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Pretrain V-JEPA 2.1 and use its dense features.",
)  # fmt: skip
config_app = typer.Typer(no_args_is_help=True, help="Look at recipes, and import official ones.")
app.add_typer(config_app, name="config")
synth_app = typer.Typer(no_args_is_help=True, help="Write labelled synthetic videos.")
app.add_typer(synth_app, name="synth")
app.add_typer(bench_app, name="bench")
app.add_typer(probe_app, name="probe")
for command in (features, explore, models, export, index, plan):
    app.command()(command)


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="ranks to start on this machine, one for each GPU")
    ] = None,
) -> None:
    """Pretrain; goes on by itself from the run folder's newest checkpoint."""
    from fastjepa.build import build, device_of
    from fastjepa.checkpoint.run_folder import given_back_unused
    from fastjepa.config.load import dump_recipe, load_recipe
    from fastjepa.launch import ending_told, launch, launched
    from fastjepa.observe.console import Console
    from fastjepa.out_of_memory import remedies_told
    from fastjepa.train.ranks import join
    from fastjepa.train.signals import stop_on_signals

    chosen = load_recipe(recipe, overrides or [])
    own = chosen.engine
    if nproc is not None:
        if own.kind == "torch" and nproc > 1:
            raise ValueError(
                f"--nproc {nproc}: engine.kind torch is one process; "
                "engine.kind=deepspeed trains on many"
            )
        raise typer.Exit(launch(["train", str(recipe), *(overrides or [])], ranks=nproc))
    sharded = own.kind == "deepspeed"
    device = device_of(own.device)
    with (
        ending_told(),
        stop_on_signals() as stop,
        join(device, timeout=own.timeout, silence=own.heartbeat, alone=sharded) as ranks,
        open(os.devnull, "w") as nowhere,
        given_back_unused(chosen.run.folder, dump_recipe(chosen)) if ranks.first else nullcontext(),
        remedies_told(chosen, ranks=ranks.size, device=device),
    ):
        console = Console(None if ranks.first else nowhere)
        trainer = build(chosen, console, ranks)
        if trainer.step >= trainer.plan.steps:
            console.say(
                f"{trainer.folder} holds all {trainer.plan.steps} steps of this recipe already; "
                "train.steps=N trains longer, run.folder=FOLDER starts anew"
            )
            finished = True
        else:
            finished = trainer.run(stop)
        if not finished:
            words = ["train", str(recipe), *(overrides or [])]
            words += ["--nproc", str(ranks.size)] if launched() else []
            again = f"{_program()} {shlex.join(words)}"
            console.say(
                f"stopped by {stop.name} after step {trainer.step}, saved; to go on: {again}"
            )
            return
        if chosen.observe.pictures:
            from fastjepa.pictures import draw

            for path, about in draw(trainer):
                console.say(f"{path}: {about}")
        folder = trainer.folder
        console.say(f"{folder}: recipe.yaml, metrics.jsonl, tensorboard/, checkpoints/latest")
        console.say(f"next: {_program()} features {folder} YOUR_VIDEOS --out features")
        console.say(
            f"      {_program()} train {recipe} run.folder=runs/mine data.video=FOLDER_OF_VIDEOS"
        )


@app.command()
def parity(
    file: Annotated[
        Path, typer.Argument(help="a golden step, such as tests/golden/video.safetensors")
    ],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, float64 or bfloat16")] = "float32",
    attention: Annotated[str, typer.Option(help="a backend of model.attention")] = "auto",
    tolerance: Annotated[float, typer.Option(help="largest relative error that passes")] = 1e-5,
) -> None:
    """Run one step of the official code's golden file with ours and compare every tensor."""
    from fastjepa.build import device_of
    from fastjepa.parity import check

    report = check(
        file, device=str(device_of(device)), dtype=dtype, attention=attention, tolerance=tolerance
    )
    for line in report.lines():
        typer.echo(line)
    if not report.passed:
        raise typer.Exit(1)


@app.command()
def doctor() -> None:
    """What of the stack is installed, which backend each part will use and why, and self-tests."""
    from rich.console import Console

    from fastjepa.doctor import as_table, as_text, examine, healthy

    findings = examine()
    terminal = Console()
    if terminal.is_terminal:
        terminal.print(as_table(findings))
    else:
        typer.echo(as_text(findings))
    if not healthy(findings):
        raise typer.Exit(1)


@config_app.command("show")
def config_show(
    recipe: RecipePath,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="as one JSON object")] = False,
) -> None:
    """Every number that follows from a recipe: tokens, levels, steps, parameters, FLOPs, memory."""
    from rich.console import Console

    from fastjepa.config.load import load_recipe
    from fastjepa.config.resolve import resolve
    from fastjepa.explain import as_json as to_json
    from fastjepa.explain import as_table, as_text, explain

    chosen = load_recipe(recipe, overrides or [])
    resolved = resolve(chosen)
    terminal = Console()
    if as_json:
        typer.echo(to_json(chosen, resolved))
    elif terminal.is_terminal:
        terminal.print(as_table(explain(chosen, resolved)))
    else:
        typer.echo(as_text(explain(chosen, resolved)))


@config_app.command("import")
def config_import(
    official: Annotated[Path, typer.Argument(help="an official V-JEPA 2 or 2.1 training YAML")],
    out: Annotated[Path | None, typer.Option(help="where to write the recipe")] = None,
) -> None:
    """Turn an official YAML into a recipe; each key is reported as kept, renamed or ignored."""
    from fastjepa.config.from_vjepa2 import import_official
    from fastjepa.config.load import dump_recipe

    recipe, reports = import_official(official)
    for report in reports:
        arrow = f" -> {report.ours} = {report.ours_value}" if report.ours else ""
        reason = f" ({report.reason})" if report.reason else ""
        typer.echo(
            f"{report.status:8} {report.key} = {report.value}{arrow}{reason}", err=out is None
        )
    text = dump_recipe(recipe)
    if out is None:
        typer.echo(text, nl=False)
    elif out.exists():
        raise ValueError(f"--out {out}: exists already; choose another name")
    else:
        out.write_text(text, encoding="utf-8")
        typer.echo(f"wrote {out}")


@synth_app.command("moving-digits")
def synth_moving_digits(
    out: Annotated[Path, typer.Argument(help="folder to write to")],
    count: Annotated[int, typer.Option(help="videos")] = 100,
    frames: Annotated[int, typer.Option(help="frames of a video")] = 48,
    height: Annotated[int, typer.Option(help="pixels")] = 128,
    width: Annotated[int, typer.Option(help="pixels")] = 128,
    fps: Annotated[float, typer.Option(help="frames a second")] = 12.0,
    digits: Annotated[int, typer.Option(help="digits of a video")] = 2,
    split: Annotated[str, typer.Option(help="train or test: no digit image is in both")] = "train",
    seed: Annotated[int, typer.Option(help="same seed, same files")] = 0,
    codec: Annotated[str, typer.Option(help="h264, hevc, vp9, vp8, av1, mpeg4, mjpeg")] = "h264",
    workers: Annotated[int, typer.Option(min=1, help="processes")] = usable_cores(),
) -> None:
    """Handwritten digits moving over textures, with masks, classes, positions and velocities."""
    from rich.progress import track

    from fastjepa.data.moving_digits import MovingDigits
    from fastjepa.data.write_digits import write_digits

    source = MovingDigits(
        frames=frames, height=height, width=width, fps=fps, num_digits=digits, seed=seed,
        split=split,  # type: ignore[arg-type]
    )  # fmt: skip
    written = write_digits(out, source, count, codec=codec, workers=workers)
    for _ in track(written, "writing", total=count):
        pass
    typer.echo(f"{out}: {count} videos, labels in .npz files, manifest.csv")


def _program() -> str:
    """How this person can call us again: by name if it is on the path, else as they did."""
    if shutil.which("fastjepa"):
        return "fastjepa"
    called = Path(sys.argv[0])
    return "python -m fastjepa.cli" if called.suffix == ".py" else os.path.relpath(called)


def _said_by_all(error: Exception) -> bool:
    from fastjepa.train.ranks import RanksError

    return isinstance(error, RanksError)


def main(argv: list[str] | None = None) -> None:
    """Run a command; ValueError and OSError end it with their message and exit code 2."""
    try:
        app(argv)
    except (ValueError, OSError) as error:
        rank = int(os.environ.get("RANK", "0"))
        if not rank or not _said_by_all(error):
            where = f"rank {rank}: " if rank else ""
            print(f"{where}error: {error}", file=sys.stderr)
        sys.exit(2)


def program() -> None:
    """`main`, as a process of its own."""
    try:
        main()
    except SystemExit as ended:
        if "fastjepa.train.ranks" not in sys.modules:
            raise
        from fastjepa.train.ranks import leave

        leave(int(ended.code or 0))


if __name__ == "__main__":
    program()
