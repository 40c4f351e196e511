"""The encoders by name: `vit_large()`, or `build_encoder("vit_large", levels=[23])`."""

from dataclasses import asdict
from functools import partial
from typing import Any

from fastjepa.model.encoder import Encoder
from fastjepa.presets import PRESETS


def build_encoder(name: str, **changes: Any) -> Encoder:
    """An encoder of the zoo; `changes` replace sizes (`depth`, `levels`, ...) or set Encoder
    options.

    Raises ValueError for an unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"model: expected one of {', '.join(PRESETS)}, got {name!r}")
    return Encoder(**{**asdict(PRESETS[name]), **changes})


vit_tiny = partial(build_encoder, "vit_tiny")
vit_small = partial(build_encoder, "vit_small")
vit_base = partial(build_encoder, "vit_base")
vit_large = partial(build_encoder, "vit_large")
vit_huge = partial(build_encoder, "vit_huge")
vit_giant = partial(build_encoder, "vit_giant")
vit_gigantic = partial(build_encoder, "vit_gigantic")
