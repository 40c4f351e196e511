"""The commands around trained weights: their features, what they are, other formats."""

from pathlib import Path
from typing import Annotated

import typer

Weights = Annotated[
    str,
    typer.Argument(
        help="run folder, checkpoint, .safetensors, official .pt, VJEPA2Model, hf://OWNER/NAME"
    ),
]


def features(
    model: Weights,
    sources: Annotated[list[str], typer.Argument(help="files, folders, globs or manifests")],
    out: Annotated[Path, typer.Option(help="folder to write to")] = Path("features"),
    levels: Annotated[
        str | None, typer.Option(help="block indices such as 5,11; last if left out")
    ] = None,
    size: Annotated[int, typer.Option(help="short side in pixels")] = 256,
    frames: Annotated[int, typer.Option(help="frames of a video's clip")] = 16,
    fps: Annotated[float, typer.Option(help="frames a second")] = 4.0,
    start: Annotated[
        float, typer.Option(help="where the clip begins: 0 to 1, which is as late as it fits")
    ] = 0.0,
    batch: Annotated[int, typer.Option(help="files at once")] = 4,
    format: Annotated[str, typer.Option(help="safetensors, npy or zarr")] = "safetensors",
    overlap: Annotated[
        int | None,
        typer.Option(
            help="read whole videos in windows of --frames that overlap by so many frames"
        ),
    ] = None,
    video: Annotated[
        bool, typer.Option("--video", help="an .mp4 of pixels beside features as colours, too")
    ] = False,
    picture: Annotated[
        bool, typer.Option("--picture", help="a .png of frames over each level's colours, too")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="replace files that exist")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Write dense features [T', H', W', D] of videos and images."""
    from fastjepa.build import device_of
    from fastjepa.features.run import extract_files
    from fastjepa.pretrained import load

    encoder = load(model)
    bad = 0
    for found in extract_files(
        encoder, sources, out,
        levels=None if levels is None else _numbers("--levels", levels),
        size=size, frames=frames, fps=fps, start=start, batch=batch, form=format,  # type: ignore[arg-type]
        overlap=overlap, video=video, picture=picture, overwrite=overwrite,
        device=device_of(device),
    ):  # fmt: skip
        if found.paths:
            written = ", ".join(map(str, found.paths))
            typer.echo(f"{found.source} -> {written} {list(found.shape)}")
        else:
            bad += 1
            typer.echo(f"warning: skipped {found.reason}", err=True)
    if bad:
        raise typer.Exit(1)


def explore(
    model: Weights,
    source: Annotated[str, typer.Argument(help="a video or an image")],
    out: Annotated[Path, typer.Option("--out", "-o", help="the .html file to write")],
    level: Annotated[int | None, typer.Option(help="block index; last if left out")] = None,
    size: Annotated[int, typer.Option(help="short side in pixels")] = 256,
    frames: Annotated[int, typer.Option(help="frames of the clip")] = 16,
    fps: Annotated[float, typer.Option(help="frames a second")] = 4.0,
    start: Annotated[
        float, typer.Option(help="where the clip begins: 0 to 1, which is as late as it fits")
    ] = 0.0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Write a page: click a patch, see its similarity to all patches of all frames."""
    from fastjepa.build import device_of
    from fastjepa.features.run import explore_file
    from fastjepa.pretrained import load

    encoder = load(model, device=device_of(device))
    shape = explore_file(
        encoder, source, out, level=level, size=size, frames=frames, fps=fps, start=start
    )
    typer.echo(f"wrote {out} {list(shape)}; open it in a browser")


def models(
    path: Annotated[
        str | None, typer.Argument(help="weights to identify; the released ones if left out")
    ] = None,
) -> None:
    """The released weights by name, or what the weights in a file or folder are."""
    from fastjepa.checkpoint.catalogue import as_text
    from fastjepa.pretrained import load

    if path is None:
        typer.echo(as_text())
        return
    encoder = load(path)
    count = sum(p.numel() for p in encoder.parameters())
    typer.echo(
        f"{path}: {encoder.origin}\n{count:,} parameters, width {encoder.width}, "
        f"{len(encoder.blocks)} blocks, levels {', '.join(map(str, encoder.levels))}, "
        f"patch {encoder.patch}, tubelet {encoder.tubelet}, {encoder.rope} RoPE"
        + (", interpolated to 256 px" if encoder.interpolate_rope else "")
    )


def export(
    weights: Weights,
    to: Annotated[str, typer.Option(help="official, hf, safetensors, onnx or torch-export")],
    out: Annotated[Path, typer.Option(help="the file to write; for hf, the folder")],
    licence: Annotated[str, typer.Option(help="for the model card")] = "unknown",
    image: Annotated[bool, typer.Option("--image", help="graphs: for images, not videos")] = False,
    levels: Annotated[
        str | None, typer.Option(help="graphs: block indices such as 5,11; last if left out")
    ] = None,
    context: Annotated[
        bool, typer.Option("--context", help="the encoder that was trained, not its average")
    ] = False,
    crop: Annotated[
        int | None,
        typer.Option(min=1, help="hf: side in pixels; the source's or the release's if left out"),
    ] = None,
) -> None:
    """Write weights in another format: official file, Hugging Face folder, safetensors, graph."""
    from fastjepa.convert import convert

    chosen = None if levels is None else _numbers("--levels", levels)
    for path in convert(
        weights, to, out, licence=licence, image=image, levels=chosen,  # type: ignore[arg-type]
        context=context, crop=crop,
    ):  # fmt: skip
        typer.echo(f"wrote {path}")


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option}: expected numbers such as 5,11, got {text!r}") from None
