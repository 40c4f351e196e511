"""V-JEPA 2.1's networks: tokenizers, encoder, predictor, and the zoo of encoders."""

from fastjepa.model.encoder import Encoder
from fastjepa.model.predictor import Predictor
from fastjepa.model.zoo import (
    build_encoder,
    vit_base,
    vit_giant,
    vit_gigantic,
    vit_huge,
    vit_large,
    vit_small,
    vit_tiny,
)

__all__ = [
    "Encoder",
    "Predictor",
    "build_encoder",
    "vit_base",
    "vit_giant",
    "vit_gigantic",
    "vit_huge",
    "vit_large",
    "vit_small",
    "vit_tiny",
]
