"""Hugging Face's `VJEPA2Model` itself: its weights here, ours there, with the same features."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastjepa
from fastjepa.checkpoint import CheckpointError, read_huggingface, write_huggingface
from fastjepa.checkpoint.encoder_sizes import parse_sizes
from fastjepa.checkpoint.huggingface import Setup
from fastjepa.model import Encoder

SIZES: dict[str, Any] = {
    "width": 48, "depth": 4, "heads": 2, "mlp_width": 209, "levels": [0, 1, 2, 3], "patch": 16,
    "tubelet": 2, "interpolate_rope": False, "rope": "tiled", "generation": "2",
}  # fmt: skip
NEAR = {"rtol": 1e-5, "atol": 1e-5}


def stirred(module: Any) -> Any:
    """Random weights large enough that positions and norms matter."""
    torch.manual_seed(1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return module.eval()


def clip(frames: int = 4) -> Tensor:
    return torch.randn(1, 3, frames, 256, 256, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def theirs_on(model: Any, x: Tensor) -> Tensor:
    out: Tensor = model(x.transpose(1, 2), skip_predictor=True).last_hidden_state
    return out


@torch.no_grad()
def same_features(theirs: Any, ours: Encoder) -> None:
    for x in (clip(), clip(1)):
        torch.testing.assert_close(ours.features(x).flatten(1, 3), theirs_on(theirs, x), **NEAR)


def test_their_random_weights_here(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.VJEPA2Config(
        hidden_size=48, num_attention_heads=2, num_hidden_layers=3, mlp_ratio=48 / 11,
        crop_size=256, pred_hidden_size=24, pred_num_attention_heads=2, pred_num_hidden_layers=2,
    )  # fmt: skip
    theirs = stirred(transformers.VJEPA2Model(config))
    theirs.save_pretrained(tmp_path)
    ours = fastjepa.load(tmp_path)
    assert ours.origin == "V-JEPA 2, 3 blocks of 48, a Hugging Face VJEPA2Model"
    same_features(theirs, ours)
    tensors, sizes, predictor = read_huggingface(tmp_path)
    write_huggingface(tmp_path / "again", tensors, sizes, predictor, Setup(predictor_heads=2))
    again = transformers.VJEPA2Model.from_pretrained(tmp_path / "again")
    assert again.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("generation", ["2", "2.1"])
def test_ours_there(tmp_path: Path, generation: str) -> None:
    """A 2.1 encoder with tiled RoPE loses its image tokenizer; what it does with videos stays."""
    transformers = pytest.importorskip("transformers")
    raw = {**SIZES, "generation": generation, "interpolate_rope": generation == "2.1"}
    ours = stirred(Encoder(**raw))
    write_huggingface(tmp_path, ours.state_dict(), parse_sizes(raw, ""))
    theirs, info = transformers.VJEPA2Model.from_pretrained(tmp_path, output_loading_info=True)
    assert all(name.startswith("predictor.") for name in info["missing_keys"])
    assert not info["unexpected_keys"]
    assert theirs.config.hidden_size == 48
    with torch.no_grad():
        expected = ours.features(clip()).flatten(1, 3)
        torch.testing.assert_close(theirs_on(theirs.eval(), clip()), expected, **NEAR)


@pytest.mark.parametrize(
    ("change", "crop", "words"),
    [
        ({"rope": "interleaved"}, 256, r"RoPE is V-JEPA 2\.1's .* train with model\.rope=tiled"),
        ({"interpolate_rope": True}, 384, "interpolated, so only crop 256 fits, not 384"),
        ({}, 250, "crop 250 is no multiple of the patch 16"),
    ],
)
def test_what_that_model_cannot_express_is_said(
    tmp_path: Path, change: dict[str, Any], crop: int, words: str
) -> None:
    raw = {**SIZES, **change}
    with pytest.raises(
        CheckpointError, match=f"VJEPA2Model cannot express this encoder: .*{words}"
    ):
        write_huggingface(
            tmp_path, Encoder(**raw).state_dict(), parse_sizes(raw, ""), setup=Setup(crop=crop)
        )
    assert not list(tmp_path.iterdir())
