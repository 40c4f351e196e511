"""A model card beside exported weights: what they are, how they were trained, the licence."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import fastjepa
from fastjepa.checkpoint.found import FoundEncoder
from fastjepa.checkpoint.run_folder import RECIPE
from fastjepa.checkpoint.tensor_file import CheckpointError


def model_card(
    found: FoundEncoder, file: str, licence: str, metrics: Mapping[str, float] | None = None
) -> str:
    """Markdown with the front matter of the Hugging Face hub.

    `metrics` are those that were logged of these weights. Recipe and data sets are those of the run
    around a checkpoint; other weights say that theirs are not known. Raises CheckpointError for a
    recipe that cannot be read.
    """
    run = found.path.parent.parent if found.kind == "checkpoint" else None
    sizes = "\n".join(f"| {key} | {_shown(value)} |" for key, value in found.sizes.items())
    front = yaml.safe_dump(
        {"license": licence, "library_name": "fastjepa", "tags": ["v-jepa", "video", "image"]},
        sort_keys=False,
    )
    return f"""---
{front}---
# {found.about}

`{file}`, exported with fastjepa {fastjepa.__version__}. Licence: {licence}.

    import fastjepa
    encoder = fastjepa.load("{file}")
    features = encoder.features(clip)  # [B, 3, T, H, W], normalised -> [B, T', H', W', D]

## The encoder

| | |
|---|---|
{sizes}

## Data

{_data(run)}

## Metrics

{_metrics(metrics)}

## Recipe

{_recipe(run)}
"""


def _data(run: Path | None) -> str:
    recipe = _read_recipe(run)
    if recipe is None:
        return "Not known: not exported from a run."
    lines = [
        f"- {kind}: {source['path']} (weight {source['weight']})"
        for kind in ("video", "image")
        for source in recipe.get("data", {}).get(kind) or []
    ]
    return "\n".join(lines) or "None named in the recipe."


def _metrics(metrics: Mapping[str, float] | None) -> str:
    if metrics is None:
        return "Not known: none were logged of these weights."
    rows = "\n".join(f"| {key} | {value:.6g} |" for key, value in metrics.items())
    return f"The last that were logged:\n\n| metric | value |\n|---|---|\n{rows}"


def _recipe(run: Path | None) -> str:
    if run is None or not (run / RECIPE).is_file():
        return "Not known: not exported from a run."
    text = (run / RECIPE).read_text(encoding="utf-8").rstrip()
    return f"```yaml\n{text}\n```"


def _read_recipe(run: Path | None) -> Mapping[str, Any] | None:
    if run is None or not (run / RECIPE).is_file():
        return None
    try:
        recipe = yaml.safe_load((run / RECIPE).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise CheckpointError(f"{run / RECIPE}: cannot be read: {error}") from error
    return recipe if isinstance(recipe, Mapping) else None


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
