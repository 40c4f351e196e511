"""Weights out: any weights that can be loaded to another format. `fastjepa export`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from fastjepa.checkpoint import (
    FoundEncoder,
    read_networks,
    write_encoder,
    write_huggingface,
    write_official,
)
from fastjepa.checkpoint.catalogue import released
from fastjepa.checkpoint.huggingface import Setup, read_setup
from fastjepa.checkpoint.model_card import model_card
from fastjepa.durable import whole_file, write_text
from fastjepa.model.traced import TracedEncoder
from fastjepa.observe.sinks import read_metrics
from fastjepa.pretrained import build, local

Format = Literal["official", "hf", "safetensors", "onnx", "torch-export"]
OPSET = 18
_GRAPHS = ("onnx", "torch-export")


def convert(
    source: str | Path,
    to: Format,
    out: Path,
    *,
    licence: str = "unknown",
    image: bool = False,
    levels: Sequence[int] | None = None,
    context: bool = False,
    crop: int | None = None,
) -> list[Path]:
    """Write the weights in `source`, whatever `fastjepa.load` takes, as `out`; returns the files
    that were written.

    `official`: every network that is there, as a `.pt`; `hf`: a folder of `VJEPA2Model`;
    `safetensors`: the encoder with its predictor, if there is one, and a card; `onnx` and
    `torch-export`: the encoder's graph for videos, or for images (`image`), with the features of
    `levels`, the last one if None, at any batch, number of frames and resolution that divides.
    `context` takes the encoder that was trained rather than its average. `crop` is the side in
    pixels that a `VJEPA2Model` is for; if None that of the source's config, else that of the
    released file of its name, else 256. Raises ValueError: a format that there is not, an option of
    another one, a file that exists, weights that the format cannot express.
    """
    if to not in get_args(Format):
        raise ValueError(f"--to: expected one of {', '.join(get_args(Format))}, got {to!r}")
    for option, given, formats in (
        ("--image", image, _GRAPHS),
        ("--levels", levels is not None, _GRAPHS),
        ("--crop", crop is not None, ("hf",)),
    ):
        if given and to not in formats:
            raise ValueError(f"{option}: is for --to {' and '.join(formats)}, not {to}")
    outputs = _outputs(out, to)
    for path in outputs:
        if path.exists():
            raise ValueError(f"--out {path}: exists already; choose another name")
    networks, found = read_networks(local(source))
    if context:
        found = _context(networks, found, to)
    out.parent.mkdir(parents=True, exist_ok=True)
    if to == "official":
        write_official(out, networks, found.sizes)
        return [out]
    if to == "hf":
        # A 2.1 predictor has no place there.
        predictor = networks.get("predictor") if found.sizes["generation"] == "2" else None
        text = model_card(found, out.name, licence, _metrics(found))
        write_huggingface(out, found.tensors, found.sizes, predictor, _setup(found, crop))
        write_text(out / "README.md", text)
        return sorted(out.iterdir())
    if to == "safetensors":
        text = model_card(found, out.name, licence, _metrics(found))
        notes = {"license": licence, "about": found.about}
        write_encoder(out, found.tensors, found.sizes, notes, networks.get("predictor"))
        write_text(outputs[1], text)
        return outputs
    return _write_graph(found, to, out, image=image, levels=levels)


def _outputs(out: Path, to: Format) -> list[Path]:
    """Files, or the folder, that a format may write."""
    if to == "safetensors":
        if out.suffix == ".md":
            raise ValueError(f"--out {out}: the model card takes this name; choose another ending")
        return [out, out.with_suffix(".md")]
    return [out, Path(f"{out}.data")] if to == "onnx" else [out]


def _metrics(found: FoundEncoder) -> dict[str, float] | None:
    """The last that a run logged up to its checkpoint."""
    log = found.path.parent.parent / "metrics.jsonl"
    if found.step is None or not log.is_file():
        return None
    known = [row for row in read_metrics(log) if row["step"] <= found.step]
    return known[-1] if known else None


def _setup(found: FoundEncoder, crop: int | None) -> Setup:
    if found.kind == "huggingface":
        setup = read_setup(found.path)
    else:
        known = released(found.path.name)
        setup = Setup(crop=known.size) if known else Setup()
    return setup if crop is None else setup._replace(crop=crop)


def _context(
    networks: Mapping[str, Mapping[str, Tensor]], found: FoundEncoder, to: Format
) -> FoundEncoder:
    """The same, with the encoder that was trained in the place of its average."""
    if to == "official":
        raise ValueError("--context: an official file has both encoders; leave --context out")
    if "encoder" not in networks:
        raise ValueError(f"--context: {found.path} has no other encoder than {found.about}")
    about = f"{found.about}, its context encoder"
    return replace(found, tensors=networks["encoder"], about=about)


def _write_graph(
    found: FoundEncoder, to: Format, out: Path, *, image: bool, levels: Sequence[int] | None
) -> list[Path]:
    encoder = build(found, str(found.path))
    graph = TracedEncoder(encoder, encoder.levels[-1:] if levels is None else levels, image=image)
    program = trace(graph)
    if to == "torch-export":
        with whole_file(out) as temporary:
            torch.export.save(program, temporary)
        return [out]
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError("--to onnx: needs onnxscript: pip install 'fastjepa[onnx]'") from error
    names = [f"level{level}" for level in graph.levels]
    exported = torch.onnx.export(
        program, dynamo=True, input_names=["clip"], output_names=names, opset_version=OPSET,
        verbose=False,
    )  # fmt: skip
    assert exported is not None
    exported.save(out)
    return [path for path in _outputs(out, "onnx") if path.exists()]


@torch.no_grad()
def trace(graph: TracedEncoder) -> torch.export.ExportedProgram:
    """The graph with batch, frames, height and width as symbols."""
    encoder = graph.encoder
    patch, tubelet = encoder.patch, 1 if graph.image else encoder.tubelet
    # Sides of an example must differ from 0 and 1 in tokens, or they would be constants.
    clip = torch.zeros(2, 3, 1 if graph.image else 2 * tubelet, 3 * patch, 4 * patch)
    dimension = torch.export.Dim
    symbols = {0: dimension("batch"), 3: patch * dimension("rows"), 4: patch * dimension("columns")}
    if not graph.image:
        symbols[2] = tubelet * dimension("steps")
    return torch.export.export(graph, (clip,), dynamic_shapes={"clip": symbols})
