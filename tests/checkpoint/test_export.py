"""An encoder and its sizes are read back from a run, a checkpoint, an exported or official file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastjepa.checkpoint import (
    CheckpointError,
    EncoderSizes,
    read_encoder,
    save_checkpoint,
    write_encoder,
)

SIZES = EncoderSizes(
    width=8,
    depth=3,
    heads=2,
    mlp_width=24,
    levels=(1, 2),
    patch=4,
    tubelet=2,
    interpolate_rope=True,
    rope="interleaved",
    generation="2.1",
)


def tensors(value: float = 0.5) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (8, 3, 2, 4, 4),
        "patch_embed_img.proj.weight": (8, 3, 1, 4, 4),
        "norms_block.0.weight": (8,),
        "norms_block.1.weight": (8,),
    }
    shapes |= {f"blocks.{block}.mlp.fc1.weight": (24, 8) for block in range(3)}
    return {name: torch.full(shape, value) for name, shape in shapes.items()}


def make_run(run: Path, step: int = 5, model: Any = SIZES, value: float = 2.0) -> Path:
    parts = {"encoder": tensors(-1.0), "target_encoder": tensors(value), "rng": {}}
    return save_checkpoint(run, step, parts, {"model": model}, keep=2)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[k], expected[k]) for k in found
    )


def test_an_exported_file_is_read_back_with_its_sizes(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "encoder.safetensors"
    write_encoder(path, tensors(), SIZES)
    found = read_encoder(path)
    assert same(found.tensors, tensors())
    assert found.sizes == SIZES
    assert found.about == "V-JEPA 2.1, 3 blocks of 8, an exported file"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert {key: json.loads(metadata[key]) for key in SIZES} == {**SIZES, "levels": [1, 2]}
    assert [file.name for file in path.parent.iterdir()] == ["encoder.safetensors"]


def test_a_run_gives_the_target_encoder_of_its_latest_complete_checkpoint(tmp_path: Path) -> None:
    make_run(tmp_path, 5, value=5.0)
    newest = make_run(tmp_path, 6, value=6.0)
    for path in (tmp_path, newest, tmp_path / "checkpoints" / "latest"):
        found = read_encoder(path)
        assert same(found.tensors, tensors(6.0))
        assert found.sizes == SIZES
        assert found.about.endswith("target_encoder of a run after 6 steps")
    (newest / "target_encoder.safetensors").unlink()
    assert same(read_encoder(tmp_path).tensors, tensors(5.0))
    with pytest.raises(CheckpointError, match=r"target_encoder\.safetensors: missing"):
        read_encoder(newest)


def test_an_altered_checkpoint_is_not_used_for_features(tmp_path: Path) -> None:
    file = make_run(tmp_path) / "target_encoder.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 4
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"target_encoder\.safetensors: damaged"):
        read_encoder(tmp_path)


def test_an_official_file_is_read_and_unknown_sizes_are_not_guessed(tmp_path: Path) -> None:
    width = 192
    official = {
        "patch_embed.proj.weight": torch.zeros(1).expand(width, 3, 2, 16, 16),
        "patch_embed_img.proj.weight": torch.zeros(1).expand(width, 3, 1, 16, 16),
        **{f"norms_block.{level}.weight": torch.ones(width) for level in range(4)},
        **{f"blocks.{i}.mlp.fc1.weight": torch.zeros(1).expand(768, width) for i in range(12)},
    }
    torch.save({"ema_encoder": official}, tmp_path / "official.pt")
    found = read_encoder(tmp_path / "official.pt")
    assert same(found.tensors, official)
    assert found.about == "V-JEPA 2.1, vit_tiny, ema_encoder of an official file"
    assert (found.sizes["heads"], found.sizes["levels"]) == (3, (2, 5, 8, 11))
    save_file(tensors(), tmp_path / "unknown.safetensors")
    with pytest.raises(
        CheckpointError, match="of no released size, and nothing says its number of heads"
    ):
        read_encoder(tmp_path / "unknown.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 16}, "width 16 where the tensors have 8"),
        ({"depth": 4, "levels": (1, 3)}, "depth 4 where the tensors have 3"),
        ({"mlp_width": 32}, "mlp_width 32 where the tensors have 24"),
        ({"patch": 8}, "patch 8 where the tensors have 4"),
        ({"tubelet": 1}, "tubelet 1 where the tensors have 2"),
        ({"levels": (2,)}, "num_levels 1 where the tensors have 2"),
        ({"heads": 3}, "heads 3, which does not divide width 8"),
        ({"heads": "2"}, "heads '2'; expected a whole number above 0"),
        ({"heads": True}, "heads True; expected a whole number"),
        ({"levels": (2, 1)}, r"levels \(2, 1\); expected rising block indices from 0 to 2"),
        ({"levels": (1, 3)}, "expected rising block indices from 0 to 2"),
        ({"interpolate_rope": None}, "interpolate_rope None; expected true or false"),
        ({"rope": "both"}, "rope 'both'; expected interleaved or tiled"),
        ({"generation": "2"}, "generation 2 where the tensors have 2.1"),
    ],
)
def test_sizes_that_are_not_the_tensors_are_refused_on_the_way_out_and_in(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    wrong: Any = {**SIZES, **change}
    with pytest.raises(CheckpointError, match=message):
        write_encoder(tmp_path / "a.safetensors", tensors(), wrong)
    assert not list(tmp_path.iterdir())
    metadata = {key: json.dumps(value) for key, value in wrong.items()}
    save_file(tensors(), tmp_path / "a.safetensors", {**metadata, "fastjepa": "0"})
    with pytest.raises(CheckpointError, match=r"a\.safetensors: "):
        read_encoder(tmp_path / "a.safetensors")


def test_sizes_that_are_not_even_json_are_named(tmp_path: Path) -> None:
    metadata = {key: json.dumps(value) for key, value in SIZES.items()}
    save_file(tensors(), tmp_path / "a.safetensors", {**metadata, "fastjepa": "0", "patch": "four"})
    with pytest.raises(
        CheckpointError, match=r"a\.safetensors: patch 'four'; expected a whole number"
    ):
        read_encoder(tmp_path / "a.safetensors")


@pytest.mark.parametrize("model", [None, "vit_tiny", {"width": 8}])
def test_a_checkpoint_that_does_not_say_its_model_is_refused(tmp_path: Path, model: object) -> None:
    make_run(tmp_path, model=model)
    with pytest.raises(CheckpointError, match=r"model in state\.json: "):
        read_encoder(tmp_path)


def test_places_without_an_encoder_say_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none: cannot be read: No such file"):
        read_encoder(tmp_path / "none")
    with pytest.raises(
        CheckpointError, match=r"manifest\.json: missing, so .* is not a complete checkpoint"
    ):
        read_encoder(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="a run's folder without a complete checkpoint"):
        read_encoder(tmp_path)


def test_a_file_that_cannot_be_written_is_named_and_the_old_one_stays(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(
        CheckpointError,
        match=r"file/a\.safetensors: cannot be written: Not a directory|File exists",
    ):
        write_encoder(tmp_path / "file" / "a.safetensors", tensors(), SIZES)
    assert (tmp_path / "file").read_text() == "old"
