"""`fastjepa plan`: its options, and where its answer goes."""

from typing import Annotated

import typer

from fastjepa.cli_arguments import Overrides, RecipePath


def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(help="GPUs in all")] = 8,
    gpu: Annotated[str, typer.Option(help="a100, h100, h200 or b200")] = "h100",
    gpus_per_node: Annotated[int, typer.Option(help="GPUs that NVLink joins")] = 8,
    nvlink: Annotated[
        float | None, typer.Option(help="GB/s each way inside a node; the data sheet's if none")
    ] = None,
    network: Annotated[
        float | None,
        typer.Option(
            help="GB/s each way between nodes for each GPU; the vendor's system's if none"
        ),
    ] = None,
    mfu: Annotated[
        float, typer.Option(help="share of the peak that is reached, recompute not counted")
    ] = 0.5,
    reserve: Annotated[float, typer.Option(help="share of the memory left free")] = 0.1,
    as_json: Annotated[bool, typer.Option("--json", help="as one JSON object")] = False,
) -> None:
    """Memory, communication, largest batches, time and GPU-hours of a recipe on many GPUs."""
    from rich.console import Console

    from fastjepa.config.load import load_recipe
    from fastjepa.config.resolve import resolve
    from fastjepa.plan_report import as_json as to_json
    from fastjepa.plan_report import as_table, as_text, tables
    from fastjepa.planner import Cluster, make_plan
    from fastjepa.planning.gpus import gpu_named

    chosen = load_recipe(recipe, overrides or [])
    cluster = Cluster(
        gpus=gpus,
        gpu=gpu_named(gpu),
        gpus_per_node=gpus_per_node,
        nvlink=None if nvlink is None else nvlink * 1e9,
        network=None if network is None else network * 1e9,
        mfu=mfu,
        reserve=reserve,
    )
    found = make_plan(chosen, resolve(chosen), cluster)
    terminal = Console()
    if as_json:
        typer.echo(to_json(found))
    elif terminal.is_terminal:
        terminal.print(as_table(tables(found)))
    else:
        typer.echo(as_text(tables(found)))
