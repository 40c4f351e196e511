"""Weights out: official files bit for bit, model cards, graphs with the same features."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import fastjepa
from fastjepa.checkpoint import (
    CheckpointError,
    read_encoder,
    read_networks,
    save_checkpoint,
    write_official,
)
from fastjepa.checkpoint.huggingface import read_setup
from fastjepa.checkpoint.layout import begin, publish, state_text
from fastjepa.checkpoint.manifest import write_shares
from fastjepa.checkpoint.pieces import Piece
from fastjepa.cli import main
from fastjepa.convert import convert
from fastjepa.model import Encoder, Predictor, build_encoder

SIZES: dict[str, Any] = {
    "width": 48, "depth": 4, "heads": 2, "mlp_width": 96, "levels": [1, 3], "patch": 16,
    "tubelet": 2, "interpolate_rope": True, "rope": "interleaved", "generation": "2.1",
}  # fmt: skip
SECOND = {"generation": "2", "rope": "tiled", "interpolate_rope": False}


def stirred(module: Any, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return module.eval().requires_grad_(False)


def clip(*shape: int) -> Tensor:
    return torch.randn(shape[0], 3, *shape[1:], generator=torch.Generator().manual_seed(2))


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in expected.items()
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with one checkpoint of all three networks."""
    folder = tmp_path / "run"
    tensors = {
        "encoder": stirred(Encoder(**SIZES), 1).state_dict(),
        "target_encoder": stirred(Encoder(**SIZES), 2).state_dict(),
        "predictor": stirred(
            Predictor(encoder_width=48, num_levels=2, width=24, depth=2, heads=2), 3
        ).state_dict(),
    }
    save_checkpoint(folder, 9, tensors, {"model": SIZES}, keep=1)
    (folder / "recipe.yaml").write_text(
        "run: {seed: 4}\ndata:\n  video: [{path: clips, weight: 0.7}]\n  image: []\n"
    )
    (folder / "metrics.jsonl").write_text('{"step": 8, "loss": 0.5}\n{"step": 9, "loss": 0.25}\n')
    return folder


@pytest.mark.parametrize("generation", ["2.1", "2"])
def test_official_to_ours_to_official_changes_no_bit(tmp_path: Path, generation: str) -> None:
    encoder = build_encoder("vit_tiny", **(SECOND if generation == "2" else {}))
    state = stirred(encoder).state_dict()
    heads = stirred(Predictor(encoder_width=192, num_levels=4, width=24, depth=2, heads=2))
    part = "target_encoder" if generation == "2" else "ema_encoder"
    original = {
        name: {f"module.backbone.{key}": t + shift for key, t in tensors.items()}
        for name, tensors, shift in (
            (part, state, 0.0),
            ("encoder", state, 1.0),
            ("predictor", heads.state_dict(), 0.0),
        )
    }
    torch.save({**original, "epoch": 4}, tmp_path / "theirs.pt")
    convert(tmp_path / "theirs.pt", "official", tmp_path / "again.pt")
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert again.keys() - {"fastjepa"} == original.keys()
    assert all(same(again[name], original[name]) for name in original)
    convert(tmp_path / "theirs.pt", "safetensors", tmp_path / "ours.safetensors")
    convert(tmp_path / "ours.safetensors", "official", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert same(back["target_encoder"], original[part])


def test_a_run_to_official_and_back(tmp_path: Path, run: Path) -> None:
    """The number of heads, which no tensor shows, comes along."""
    convert(run, "official", tmp_path / "a.pt")
    found, expected = fastjepa.load(tmp_path / "a.pt"), fastjepa.load(run)
    assert found.origin.endswith("target_encoder of an official file")
    assert same(found.state_dict(), expected.state_dict())
    x = clip(1, 4, 64, 64)
    assert torch.equal(found.features(x), expected.features(x))
    parts = torch.load(tmp_path / "a.pt", weights_only=True)
    assert {"encoder", "predictor", "target_encoder"} < parts.keys()


def test_safetensors_come_with_a_card(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "encoder.safetensors"
    main_exits_well(
        ["export", str(run), "--to", "safetensors", "--out", str(out), "--licence", "mit"]
    )
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == [
        str(out), str(out.with_suffix(".md")),
    ]  # fmt: skip
    card = out.with_suffix(".md").read_text()
    for words in (
        "license: mit", "target_encoder of a run after 9 steps", "clips (weight 0.7)",
        "| loss | 0.25 |", "run: {seed: 4}", "| heads | 2 |",
    ):  # fmt: skip
        assert words in card
    with safe_open(out, "pt") as file:
        assert file.metadata()["license"] == "mit"
    assert same(fastjepa.load(out).state_dict(), fastjepa.load(run).state_dict())
    networks, trained = read_networks(out)[0], read_networks(run)[0]
    assert networks.keys() == {"target_encoder", "predictor"}
    assert same(dict(networks["predictor"]), dict(trained["predictor"]))
    again = tmp_path / "again.safetensors"
    convert(out, "safetensors", again)
    assert "Not known: not exported from a run." in again.with_suffix(".md").read_text()


def test_a_card_has_the_metrics_of_its_checkpoint(tmp_path: Path, run: Path) -> None:
    """Not those of later steps, and none of a line that is still being written."""
    log = run / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 12, "loss": 0.125}\n{"step": 13, "lo')
    convert(run, "safetensors", tmp_path / "a.safetensors")
    card = (tmp_path / "a.md").read_text()
    assert "| step | 9 |" in card
    assert "| loss | 0.25 |" in card
    log.write_text('{"step": 12, "loss": 0.125}\n')
    convert(run, "safetensors", tmp_path / "b.safetensors")
    assert "Not known: none were logged of these weights." in (tmp_path / "b.md").read_text()


def test_nothing_is_written_where_a_file_would_be_replaced(tmp_path: Path, run: Path) -> None:
    for there, to, out in (
        ("a.md", "safetensors", "a.safetensors"),
        ("a.onnx.data", "onnx", "a.onnx"),
    ):
        (tmp_path / there).write_text("mine")
        with pytest.raises(ValueError, match=rf"{there}: exists already"):
            convert(run, to, tmp_path / out)  # type: ignore[arg-type]
        assert (tmp_path / there).read_text() == "mine"
        assert not (tmp_path / out).exists()
    with pytest.raises(ValueError, match=r"b\.md: the model card takes this name"):
        convert(run, "safetensors", tmp_path / "b.md")
    (run / "metrics.jsonl").write_text("nonsense\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 1: expected a JSON object"):
        convert(run, "safetensors", tmp_path / "c.safetensors")
    assert not (tmp_path / "c.safetensors").exists()


def test_the_context_encoder_if_it_is_asked_for(tmp_path: Path, run: Path) -> None:
    out = tmp_path / "context.safetensors"
    main_exits_well(["export", str(run), "--to", "safetensors", "--out", str(out), "--context"])
    assert same(dict(read_encoder(out).tensors), dict(read_networks(run)[0]["encoder"]))
    assert "context encoder" in out.with_suffix(".md").read_text()
    with pytest.raises(ValueError, match="an official file has both encoders"):
        convert(run, "official", tmp_path / "a.pt", context=True)
    with pytest.raises(ValueError, match="has no other encoder than V-JEPA"):
        convert(out, "safetensors", tmp_path / "b.safetensors", context=True)


EXPORT = """
import resource, sys
from pathlib import Path
from fastjepa.convert import convert
small, large, out = map(Path, sys.argv[1:])
convert(small, "safetensors", out / "small.safetensors")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(large, "safetensors", out / "large.safetensors")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_an_export_from_many_ranks_shares_holds_less_than_a_layer(
    tmp_path: Path, run: Path
) -> None:
    sizes = {**SIZES, "width": 384, "depth": 12, "heads": 6, "mlp_width": 1536, "levels": [5, 11]}
    encoder = stirred(Encoder(**sizes)).state_dict()
    heads = stirred(Predictor(encoder_width=384, num_levels=2, width=96, depth=2, heads=2))
    parts = {"target_encoder": encoder, "encoder": encoder, "predictor": heads.state_dict()}
    temporary = begin(tmp_path / "large", 1, 0)
    written = [write_shares(temporary, cut(parts, rank, 3), rank, 3) for rank in range(3)]
    publish(temporary, written, state_text(1, {"model": sizes}), keep=1)
    arguments = [str(run), str(tmp_path / "large"), str(tmp_path)]
    grown_kib = int(
        subprocess.run(
            [sys.executable, "-c", EXPORT, *arguments], check=True, capture_output=True, text=True
        ).stdout
    )
    layer = sum(t.nbytes for name, t in encoder.items() if name.startswith("blocks.0."))
    assert sum(t.nbytes for t in encoder.values()) > 10 * layer
    assert grown_kib * 1024 < layer
    assert same(dict(read_encoder(tmp_path / "large.safetensors").tensors), dict(encoder))


def cut(parts: dict[str, dict[str, Tensor]], rank: int, ranks: int) -> dict[str, dict[str, Piece]]:
    """What a rank holds of tensors that are laid end to end and cut into equal stretches."""
    shares: dict[str, dict[str, Piece]] = {}
    for part, tensors in parts.items():
        size = -(-sum(t.numel() for t in tensors.values()) // ranks)
        place, own = 0, shares.setdefault(part, {})
        for name, tensor in tensors.items():
            start = max(rank * size - place, 0)
            stop = min((rank + 1) * size - place, tensor.numel())
            if start < stop:
                own[name] = Piece(tensor.view(-1)[start:stop], tuple(tensor.shape), start)
            place += tensor.numel()
    return shares


def main_exits_well(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0


def test_hugging_face_folders_come_with_a_card(tmp_path: Path, run: Path) -> None:
    encoder = stirred(Encoder(**{**SIZES, **SECOND}))
    sizes = {**SIZES, **SECOND}
    save_checkpoint(tmp_path / "2", 1, {"target_encoder": encoder.state_dict(), "encoder": {},
                    "predictor": {}}, {"model": sizes}, keep=1)  # fmt: skip
    written = convert(tmp_path / "2", "hf", tmp_path / "hf", licence="mit")
    assert [path.name for path in written] == ["README.md", "config.json", "model.safetensors"]
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "vjepa2"
    x = clip(1, 4, 256, 256)
    assert torch.equal(fastjepa.load(tmp_path / "hf").features(x), encoder.features(x))
    with pytest.raises(CheckpointError, match=r"its RoPE is V-JEPA 2\.1's"):
        convert(run, "hf", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_hugging_face_to_hugging_face_keeps_crop_and_predictor_heads(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.VJEPA2Config(
        hidden_size=48, num_attention_heads=2, num_hidden_layers=2, crop_size=384,
        frames_per_clip=16, pred_hidden_size=24, pred_num_attention_heads=4,
        pred_num_hidden_layers=2,
    )  # fmt: skip
    theirs = stirred(transformers.VJEPA2Model(config))
    theirs.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", "hf", tmp_path / "b")
    again = transformers.VJEPA2Model.from_pretrained(tmp_path / "b").eval()
    for key in ("crop_size", "frames_per_clip", "pred_num_attention_heads"):
        assert getattr(again.config, key) == getattr(config, key)
    x = clip(1, 4, 384, 384).transpose(1, 2)
    with torch.no_grad():
        found, expected = again(x), theirs(x)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    predicted = (one.predictor_output.last_hidden_state for one in (found, expected))
    assert torch.equal(*predicted)
    (tmp_path / "a" / "config.json").write_text('{"model_type": "vjepa2", "crop_size": [384]}')
    with pytest.raises(CheckpointError, match=r"whole numbers above 0, found .*\[384\]"):
        read_setup(tmp_path / "a")


def test_the_crop_of_other_weights_is_the_releases_or_as_asked(tmp_path: Path) -> None:
    encoder = stirred(build_encoder("vit_tiny", **SECOND)).state_dict()
    for name in ("vitg-384.pt", "mine.pt"):
        torch.save({"target_encoder": encoder}, tmp_path / name)

    def crop_of(source: str, *more: str) -> int:
        out = tmp_path / f"{source}-{len(more)}"
        words = ["export", str(tmp_path / source), "--to", "hf", "--out", str(out), *more]
        main_exits_well(words)
        return int(json.loads((out / "config.json").read_text())["crop_size"])

    assert [crop_of("vitg-384.pt"), crop_of("mine.pt")] == [384, 256]
    assert crop_of("mine.pt", "--crop", "288") == 288


SHAPES = {False: [(1, 4, 64, 96), (3, 6, 32, 80)], True: [(1, 1, 64, 96), (3, 1, 32, 80)]}


@pytest.mark.parametrize(
    ("image", "layout"), [(False, {}), (True, SECOND)], ids=["2.1 video", "2 image"]
)
def test_torch_export_has_the_same_features_at_other_sizes(
    tmp_path: Path, image: bool, layout: dict[str, Any]
) -> None:
    sizes = {**SIZES, **layout}
    encoder = stirred(Encoder(**sizes))
    save_checkpoint(tmp_path, 1, {"target_encoder": encoder.state_dict(), "encoder": {},
                    "predictor": {}}, {"model": sizes}, keep=1)  # fmt: skip
    convert(tmp_path, "torch-export", tmp_path / "a.pt2", image=image, levels=[1, 3])
    graph = torch.export.load(tmp_path / "a.pt2").module()
    for shape in SHAPES[image]:
        x = clip(*shape)
        for found, expected in zip(graph(x), encoder.features(x, [1, 3]), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("image", [False, True], ids=["video", "image"])
def test_onnx_runtime_has_the_same_features_at_other_sizes(
    tmp_path: Path, run: Path, image: bool
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    written = convert(run, "onnx", tmp_path / "a.onnx", image=image, levels=[1, 3])
    assert written[0].name == "a.onnx"
    session = onnxruntime.InferenceSession(written[0], providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_outputs()] == ["level1", "level3"]
    encoder = fastjepa.load(run)
    for shape in [*SHAPES[image], (1, 1 if image else 2, 16, 16)]:
        x = clip(*shape)
        outputs = session.run(None, {"clip": x.numpy()})
        for found, expected in zip(outputs, encoder.features(x, [1, 3]), strict=True):
            torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


def test_bad_wishes_are_named(tmp_path: Path, run: Path) -> None:
    with pytest.raises(ValueError, match=r"--to: expected one of official, hf, .* got 'gguf'"):
        convert(run, "gguf", tmp_path / "a")  # type: ignore[arg-type]
    (tmp_path / "there").touch()
    with pytest.raises(ValueError, match="there: exists already"):
        convert(run, "official", tmp_path / "there")
    with pytest.raises(ValueError, match=r"levels: expected some of \[1, 3\], got \[2\]"):
        convert(run, "torch-export", tmp_path / "a.pt2", levels=[2])


@pytest.mark.parametrize(
    ("to", "option", "said"),
    [
        ("safetensors", {"image": True}, "--image: is for --to onnx and torch-export, not safeten"),
        ("official", {"levels": [1]}, "--levels: is for --to onnx and torch-export, not official"),
        ("onnx", {"crop": 384}, "--crop: is for --to hf, not onnx"),
    ],
)
def test_an_option_of_another_format_is_refused(
    run: Path, tmp_path: Path, to: Any, option: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        convert(run, to, tmp_path / "out", **option)
    assert not (tmp_path / "out").exists()


def test_what_a_distilled_file_supervised_is_told(run: Path, tmp_path: Path) -> None:
    networks, found = read_networks(run)
    idle = {
        name: torch.ones_like(tensor) if name.endswith("weight") else torch.zeros_like(tensor)
        for name, tensor in found.tensors.items()
        if name.startswith("norms_block.0.")
    }
    assert idle
    student = {**networks, "target_encoder": {**found.tensors, **idle}}
    write_official(tmp_path / "a.pt", student, found.sizes)
    assert read_encoder(tmp_path / "a.pt").about.endswith("official file, level 1 not supervised")
