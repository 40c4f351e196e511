"""fastjepa.load: every layout of weights there is, told apart; all else refused by its keys."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastjepa
from fastjepa.bench.checkout import make_importable
from fastjepa.checkpoint import CheckpointError, save_checkpoint, write_encoder, write_huggingface
from fastjepa.checkpoint.encoder_sizes import parse_sizes
from fastjepa.model import Encoder, build_encoder

SECOND: dict[str, Any] = {"generation": "2", "rope": "tiled", "interpolate_rope": False}
SIZES: dict[str, Any] = {
    "width": 48, "depth": 4, "heads": 2, "mlp_width": 96, "levels": [1, 3], "patch": 16,
    "tubelet": 2, "interpolate_rope": True, "rope": "interleaved", "generation": "2.1",
}  # fmt: skip


def stirred(encoder: Encoder) -> Encoder:
    """Random weights large enough that positions and norms matter."""
    torch.manual_seed(1)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return encoder.eval()


def clip(frames: int = 4, side: int = 64) -> Tensor:
    return torch.randn(2, 3, frames, side, side, generator=torch.Generator().manual_seed(2))


def prefixed(encoder: Encoder) -> dict[str, Tensor]:
    return {f"module.backbone.{name}": t for name, t in encoder.state_dict().items()}


def same_features(found: Encoder, expected: Encoder) -> None:
    for x in (clip(), clip(frames=1)):
        for level, wanted in zip(found(x), expected(x), strict=True):
            assert torch.equal(level, wanted)


@pytest.mark.parametrize("part", ["target_encoder", "ema_encoder", "encoder"])
def test_official_files_of_v_jepa_2_1(tmp_path: Path, part: str) -> None:
    encoder = stirred(build_encoder("vit_tiny"))
    torch.save({part: prefixed(encoder), "epoch": 3}, tmp_path / "a.pt")
    found = fastjepa.load(tmp_path / "a.pt")
    assert found.origin == f"V-JEPA 2.1, vit_tiny, {part} of an official file"
    assert not found.training
    assert not any(p.requires_grad for p in found.parameters())
    same_features(found, encoder)


def test_official_files_of_v_jepa_2(tmp_path: Path) -> None:
    encoder = stirred(build_encoder("vit_tiny", **SECOND))
    torch.save({"target_encoder": prefixed(encoder), "predictor": {}}, tmp_path / "a.pt")
    found = fastjepa.load(str(tmp_path / "a.pt"))
    assert found.origin == "V-JEPA 2, vit_tiny, target_encoder of an official file"
    assert (found.generation, found.rope, found.interpolate_rope) == ("2", "tiled", False)
    same_features(found, encoder)


@pytest.fixture
def small() -> Encoder:
    return stirred(Encoder(**SIZES))


def test_runs_checkpoints_and_exported_files(tmp_path: Path, small: Encoder) -> None:
    run, file = tmp_path / "run", tmp_path / "encoder.safetensors"
    step = save_checkpoint(run, 7, {"target_encoder": small.state_dict()}, {"model": SIZES}, keep=1)
    write_encoder(file, small.state_dict(), parse_sizes(SIZES, ""))
    for path, origin in (
        (run, "target_encoder of a run after 7 steps"),
        (step, "target_encoder of a run after 7 steps"),
        (file, "an exported file"),
    ):
        found = fastjepa.load(path)
        assert found.origin == f"V-JEPA 2.1, 4 blocks of 48, {origin}"
        same_features(found, small)


def test_files_written_before_there_were_two_layouts(tmp_path: Path, small: Encoder) -> None:
    old = {key: value for key, value in SIZES.items() if key not in ("rope", "generation")}
    save_checkpoint(tmp_path, 1, {"target_encoder": small.state_dict()}, {"model": old}, keep=1)
    same_features(fastjepa.load(tmp_path), small)


def test_another_type_and_untouched_files(tmp_path: Path, small: Encoder) -> None:
    """Weights stay mapped from the file; writing to them must not reach it."""
    file = tmp_path / "encoder.safetensors"
    write_encoder(file, small.state_dict(), parse_sizes(SIZES, ""))
    before = file.read_bytes()
    found = fastjepa.load(file)
    with torch.no_grad():
        found.norms_block[0].weight.zero_()  # type: ignore[operator]
    assert file.read_bytes() == before
    half = fastjepa.load(file, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.features(clip()).isfinite().all()


def hugging_face(folder: Path, heads: int = 2) -> Encoder:
    encoder = stirred(Encoder(**{**SIZES, **SECOND, "heads": heads, "levels": [0, 1, 2, 3]}))
    sizes = parse_sizes({**SIZES, **SECOND, "heads": heads, "levels": [0, 1, 2, 3]}, "")
    write_huggingface(folder, encoder.state_dict(), sizes)
    return encoder


def test_hugging_face_folders(tmp_path: Path) -> None:
    encoder = hugging_face(tmp_path)
    found = fastjepa.load(tmp_path)
    assert found.origin == "V-JEPA 2, 4 blocks of 48, a Hugging Face VJEPA2Model"
    same_features(found, encoder)


def test_hugging_face_folders_in_several_files(tmp_path: Path) -> None:
    encoder = hugging_face(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    index = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, tmp_path / file)
        index |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    same_features(fastjepa.load(tmp_path), encoder)
    index["encoder.layernorm.weight"] = "../elsewhere.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(CheckpointError, match="names files outside its folder"):
        fastjepa.load(tmp_path)


def test_foreign_hugging_face_folders_say_what_does_not_fit(tmp_path: Path) -> None:
    hugging_face(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(tmp_path / "model.safetensors")

    def refused(match: str, **changes: object) -> None:
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(CheckpointError, match=match):
            fastjepa.load(tmp_path)

    refused("model_type 'vit'; expected 'vjepa2'", model_type="vit")
    refused("hidden_act 'relu' where only 'gelu' is known", hidden_act="relu")
    refused("depth 5 where the tensors have 4", num_hidden_layers=5)
    refused("heads 5, which does not divide width 48", num_attention_heads=5)
    refused("expected numbers above 0", patch_size=[16, 16])
    save_file({**tensors, "classifier.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    refused("not a VJEPA2Model: unexpected classifier.weight")
    gone = {n: t for n, t in tensors.items() if n != "encoder.layer.1.attention.key.bias"}
    save_file(gone, tmp_path / "model.safetensors")
    refused("no encoder.layer.1.attention.key.bias")
    gone = {n: t for n, t in tensors.items() if n != "encoder.layer.1.mlp.fc2.bias"}
    save_file(gone, tmp_path / "model.safetensors")
    refused("1 missing: blocks.1.mlp.fc2.bias")


def test_keys_that_do_not_fit_are_each_named(tmp_path: Path, small: Encoder) -> None:
    state = dict(small.state_dict())
    del state["blocks.2.attn.proj.bias"]
    state["blocks.3.more"] = torch.ones(1)
    state["norms_block.0.bias"] = torch.ones(5)
    write_encoder(tmp_path / "a.safetensors", state, parse_sizes(SIZES, ""))
    with pytest.raises(
        CheckpointError,
        match=r"1 missing: blocks\.2\.attn\.proj\.bias; 1 extra: blocks\.3\.more; "
        r"1 of another shape: norms_block\.0\.bias \[5\] where \[48\] is expected",
    ):
        fastjepa.load(tmp_path / "a.safetensors")


def test_a_released_name_without_its_file_says_where_it_is() -> None:
    with pytest.raises(
        CheckpointError, match=r"no such file; it is released at https://\S+vitl\.pt"
    ):
        fastjepa.load("nowhere/vitl.pt")


def test_a_hub_name_needs_its_package_and_both_its_parts() -> None:
    with pytest.raises(
        CheckpointError, match=r"hf://meta: (needs the package|expected hf://OWNER)"
    ):
        fastjepa.load("hf://meta")


def test_the_package_is_light_until_weights_are_asked_for() -> None:
    code = "import sys, fastjepa; print('torch' in sys.modules, callable(fastjepa.load))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "True"]
    with pytest.raises(AttributeError, match="no attribute 'lead'"):
        fastjepa.lead  # noqa: B018


MEASURE = """
import sys, torch, fastjepa
from fastjepa.model import Encoder
from fastjepa.pretrained import load
with torch.device("meta"):
    Encoder(width=48, depth=1, heads=2, mlp_width=96, levels=[0])
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
torch.zeros(1).sum()
before = peak()
encoder = load(sys.argv[1])
total = sum(p.sum().item() for p in encoder.parameters())
print((peak() - before) / sum(p.nbytes for p in encoder.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("layout", ["official", "safetensors", "hugging face"])
def test_large_files_are_never_in_memory_twice(tmp_path: Path, layout: str) -> None:
    """Peak memory for 343 MB of weights, optimizer state beside them not counted: below 1.2."""
    encoder = build_encoder("vit_base", **(SECOND if layout == "hugging face" else {}))
    if layout == "official":
        path = tmp_path / "a.pt"
        moments = {"m": torch.zeros(50_000_000)}
        torch.save({"target_encoder": prefixed(encoder), "opt": moments}, path)
    else:
        sizes = parse_sizes(
            {**SIZES, "width": 768, "depth": 12, "heads": 12, "mlp_width": 3072,
             "levels": encoder.levels, **(SECOND if layout == "hugging face" else {})}, "",
        )  # fmt: skip
        path = tmp_path / "a.safetensors"
        if layout == "hugging face":
            path = tmp_path
            write_huggingface(path, encoder.state_dict(), sizes)
        else:
            write_encoder(path, encoder.state_dict(), sizes)
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert 0.9 < float(run.stdout) < 1.2


@pytest.fixture(scope="module")
def official() -> Iterator[None]:
    """The official modules, importable while these tests run."""
    checkout = os.environ.get("VJEPA2_CHECKOUT")
    if not checkout:
        pytest.skip("VJEPA2_CHECKOUT names no checkout of the official code")
    known, path = set(sys.modules), list(sys.path)
    make_importable(Path(checkout))
    yield
    sys.path[:] = path
    for name in set(sys.modules) - known:
        if name.partition(".")[0] in ("app", "src"):
            del sys.modules[name]


@pytest.mark.usefixtures("official")
@pytest.mark.parametrize("side", [64, 256, 384])
def test_features_are_those_of_the_official_v_jepa_2_modules(tmp_path: Path, side: int) -> None:
    vit = importlib.import_module("src.models.vision_transformer")
    theirs = vit.vit_tiny(img_size=(side, side), num_frames=4, tubelet_size=2, use_rope=True)
    torch.save({"target_encoder": prefixed(stirred(theirs))}, tmp_path / "a.pt")
    found = fastjepa.load(tmp_path / "a.pt")
    x = clip(side=side)[:1]
    theirs.out_layers = list(found.levels)
    with torch.no_grad():
        for level, expected in zip(found(x), theirs(x), strict=True):
            torch.testing.assert_close(level, expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("official")
@pytest.mark.parametrize(("frames", "side"), [(4, 64), (1, 64), (2, 384)])
def test_features_are_those_of_the_official_v_jepa_2_1_modules(
    tmp_path: Path, frames: int, side: int
) -> None:
    vit = importlib.import_module("app.vjepa_2_1.models.vision_transformer")
    theirs = vit.VisionTransformer(
        img_size=(side, side), num_frames=4, embed_dim=192, depth=12, num_heads=3, use_rope=True,
        img_temporal_dim_size=1, interpolate_rope=True, modality_embedding=True,
    )  # fmt: skip
    torch.save({"ema_encoder": prefixed(stirred(theirs))}, tmp_path / "a.pt")
    found = fastjepa.load(tmp_path / "a.pt")
    x = clip(frames, side)[:1]
    with torch.no_grad():
        expected = theirs(x, training=True)[0].chunk(4, dim=-1)
        for level, wanted in zip(found(x), expected, strict=True):
            torch.testing.assert_close(level, wanted, rtol=1e-5, atol=1e-5)
