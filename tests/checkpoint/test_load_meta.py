"""Official files: the right part, plain names, the preset from the shapes; all else refused.

The files here have the released layout and shapes; each tensor is a view of one number.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastjepa.checkpoint import CheckpointError, read_official
from fastjepa.presets import PRESETS


def filled(value: float, *shape: int) -> Tensor:
    return torch.tensor(value).expand(shape)


def encoder(
    name: str, value: float = 0.5, prefix: str = "module.backbone.", num_norms: int = 4
) -> dict[str, Tensor]:
    size = PRESETS[name]
    width, mlp = size.width, size.mlp_width
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (width, 3, 2, 16, 16),
        "patch_embed_img.proj.weight": (width, 3, 1, 16, 16),
        "img_mod_embed": (1, 1, width),
        "video_mod_embed": (1, 1, width),
    }
    for block in range(size.depth):
        shapes |= {
            f"blocks.{block}.attn.qkv.weight": (3 * width, width),
            f"blocks.{block}.mlp.fc1.weight": (mlp, width),
            f"blocks.{block}.mlp.fc2.weight": (width, mlp),
        }
    shapes |= {f"norms_block.{level}.weight": (width,) for level in range(num_norms)}
    return {prefix + key: filled(value, *shape) for key, shape in shapes.items()}


def predictor(depth: int, prefix: str = "module.backbone.") -> dict[str, Tensor]:
    blocks = {f"predictor_blocks.{i}.mlp.fc1.weight": filled(0.1, 8, 4) for i in range(depth)}
    return {
        prefix + key: value
        for key, value in {"predictor_norm.weight": filled(1, 4), **blocks}.items()
    }


TRAINING = {
    "opt": {"state": {0: {"step": torch.tensor(3.0)}}},
    "scaler": None,
    "epoch": 40,
    "loss": 0.41,
    "lr": 5e-4,
}


@pytest.mark.parametrize("name", ["vit_base", "vit_large", "vit_giant", "vit_gigantic"])
def test_a_released_file_gives_its_encoder_its_predictor_and_its_preset(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / "official.pt"
    torch.save(
        {
            "encoder": encoder(name),
            "predictor": predictor(24),
            "target_encoder": encoder(name),
            **TRAINING,
        },
        path,
    )
    tensors, heads, info = read_official(path)
    assert "patch_embed.proj.weight" in tensors
    assert not [key for key in tensors if key.startswith(("module", "backbone"))]
    assert heads is not None
    assert "predictor_norm.weight" in heads
    assert info.preset == name
    assert info.part == "target_encoder"
    assert info.predictor_depth == 24
    size = PRESETS[name]
    assert info.sizes == {
        "width": size.width,
        "depth": size.depth,
        "heads": size.heads,
        "mlp_width": size.mlp_width,
        "levels": size.levels,
        "patch": 16,
        "tubelet": 2,
        "interpolate_rope": True,
        "rope": "interleaved",
        "generation": "2.1",
    }


def test_the_averaged_encoder_is_preferred_and_another_part_can_be_asked_for(
    tmp_path: Path,
) -> None:
    path = tmp_path / "distilled.pt"
    parts = {
        "encoder": encoder("vit_tiny", 1.5),
        "ema_encoder": encoder("vit_tiny", 2.5),
        "predictor": predictor(12),
    }
    torch.save(parts, path)
    tensors, _, info = read_official(path)
    assert (info.part, info.predictor_depth) == ("ema_encoder", 12)
    assert tensors["img_mod_embed"].unique().item() == 2.5
    tensors, _, info = read_official(path, part="encoder")
    assert info.part == "encoder"
    assert tensors["img_mod_embed"].unique().item() == 1.5
    with pytest.raises(
        CheckpointError, match="no target_encoder in it; found ema_encoder, encoder, predictor"
    ):
        read_official(path, part="target_encoder")


def test_levels_whose_norm_never_moved_are_told(tmp_path: Path) -> None:
    tensors = encoder("vit_tiny", 0.5, prefix="")
    for level in (0, 1, 2):
        tensors[f"norms_block.{level}.weight"] = torch.ones(192)
        tensors[f"norms_block.{level}.bias"] = torch.zeros(192)
    torch.save({"ema_encoder": tensors}, tmp_path / "a.pt")
    assert read_official(tmp_path / "a.pt")[2].untrained_levels == (0, 1, 2)


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone."])
def test_a_bare_encoder_in_either_format_is_read_whatever_its_prefix(
    tmp_path: Path, prefix: str
) -> None:
    tensors = {key: value.contiguous() for key, value in encoder("vit_tiny", prefix=prefix).items()}
    torch.save(tensors, tmp_path / "a.pt")
    save_file(tensors, tmp_path / "a.safetensors")
    bare = encoder("vit_tiny", prefix="").keys()
    for name in ("a.pt", "a.safetensors"):
        found, heads, info = read_official(tmp_path / name)
        assert found.keys() == bare
        assert heads is None
        assert (info.part, info.preset) == ("encoder", "vit_tiny")


def test_safetensors_with_the_parts_as_prefixes_are_read(tmp_path: Path) -> None:
    parts = {
        "target_encoder": encoder("vit_tiny", 3.0),
        "encoder": encoder("vit_tiny", 1.0),
        "predictor": predictor(4),
    }
    flat = {
        f"{part}.{key}": value.contiguous()
        for part, named in parts.items()
        for key, value in named.items()
    }
    save_file(flat, tmp_path / "a.safetensors")
    found, heads, info = read_official(tmp_path / "a.safetensors")
    assert info.part == "target_encoder"
    assert found["video_mod_embed"].unique().item() == 3.0
    assert heads is not None
    assert info.predictor_depth == 4


def test_one_norm_means_the_last_level(tmp_path: Path) -> None:
    torch.save({"encoder": encoder("vit_tiny", num_norms=1)}, tmp_path / "a.pt")
    sizes = read_official(tmp_path / "a.pt")[2].sizes
    assert sizes is not None
    assert sizes["levels"] == (11,)
    torch.save({"encoder": encoder("vit_tiny", num_norms=3)}, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="3 norms_block; expected 1 or 4 for vit_tiny"):
        read_official(tmp_path / "b.pt")


def test_shapes_of_no_preset_are_read_without_guessing_the_heads(tmp_path: Path) -> None:
    tensors = encoder("vit_tiny")
    tensors["module.backbone.blocks.0.mlp.fc1.weight"] = filled(0, 700, 192)
    torch.save({"encoder": tensors}, tmp_path / "a.pt")
    info = read_official(tmp_path / "a.pt")[2]
    assert info.preset is None
    assert info.sizes is None


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return (Path.touch, (self.path,))


class Shell:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("harm", [Touch, Shell])
@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
def test_a_pickle_that_would_do_something_is_refused_before_it_does(
    tmp_path: Path, harm: type[Touch] | type[Shell], new_format: bool
) -> None:
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"
    content = {"encoder": encoder("vit_tiny"), "epoch": harm(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(
        CheckpointError, match=r"evil\.pt: refused: .*, and it calls \S+$"
    ) as caught:
        read_official(path)
    assert "\n" not in str(caught.value)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists(), "the pickle of this test would not have done harm"


def second(name: str) -> dict[str, Tensor]:
    """An encoder of the V-JEPA 2 layout."""
    tensors = encoder(name, prefix="", num_norms=0)
    for key in ("patch_embed_img.proj.weight", "img_mod_embed", "video_mod_embed"):
        del tensors[key]
    return {**tensors, "norm.weight": filled(1, PRESETS[name].width)}


def test_v_jepa_2_is_known_by_its_names_and_keeps_its_own_positions(tmp_path: Path) -> None:
    named = {f"module.backbone.{key}": value for key, value in second("vit_huge").items()}
    torch.save({"encoder": named, "target_encoder": named}, tmp_path / "vith.pt")
    tensors, _, info = read_official(tmp_path / "vith.pt")
    assert tensors.keys() == second("vit_huge").keys()
    assert (info.generation, info.preset, info.part) == ("2", "vit_huge", "target_encoder")
    assert info.sizes is not None
    assert (info.sizes["generation"], info.sizes["rope"]) == ("2", "tiled")
    assert (info.sizes["heads"], info.sizes["interpolate_rope"]) == (16, False)
    assert info.untrained_levels == ()


def test_absolute_positions_are_refused(tmp_path: Path) -> None:
    """The first V-JEPA has V-JEPA 2's names and shapes, and needs positions that are not here."""
    tensors = {**second("vit_large"), "pos_embed": filled(0, 1, 1568, 1024)}
    torch.save({"target_encoder": tensors}, tmp_path / "vitl16.pth")
    with pytest.raises(
        CheckpointError, match=r"vitl16\.pth: target_encoder: pos_embed: .*V-JEPA 1"
    ):
        read_official(tmp_path / "vitl16.pth")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.99])
def test_a_truncated_file_is_one_clear_error(tmp_path: Path, legacy: bool, kept: float) -> None:
    path = tmp_path / "a.pt"
    torch.save({"encoder": encoder("vit_tiny")}, path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(CheckpointError, match=r"a\.pt: ") as caught:
        read_official(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected a dict of parts, found list"),
        ({"epoch": 3}, "epoch is int; expected a tensor"),
        ({"predictor": {"x": torch.ones(1)}}, "no encoder in it; found predictor"),
        (
            {"encoder": {"layer.weight": torch.ones(1)}},
            "no patch_embed.*found layer.weight",
        ),
        ({"encoder": {}}, "found nothing"),
    ],
)
def test_what_is_no_encoder_says_what_was_found(
    tmp_path: Path, content: object, message: str
) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message):
        read_official(tmp_path / "a.pt")


def test_a_missing_file_and_random_bytes_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.pt: cannot be read: No such file"):
        read_official(tmp_path / "none.pt")
    for number, start in enumerate([b"", b"\x80\x02", b"PK\x03\x04", b"MZ"]):
        path = tmp_path / f"random{number}.pt"
        path.write_bytes(start + bytes(range(256)))
        with pytest.raises(CheckpointError, match=rf"random{number}\.pt: ") as caught:
            read_official(path)
        assert "\n" not in str(caught.value)
