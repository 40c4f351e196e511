"""Parity with the official code, and that a golden file with one wrong number cannot pass."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastjepa.parity import check
from fastjepa.parity_report import FAMILIES

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("video", "image", "distill")
Rewrite = Callable[[dict[str, Tensor], dict[str, str]], None]


@pytest.fixture
def rewritten(tmp_path: Path) -> Callable[[str, Rewrite], Path]:
    """A golden file after a change to its tensors or metadata."""

    def write(name: str, change: Rewrite) -> Path:
        source, path = GOLDEN / f"{name}.safetensors", tmp_path / "changed.safetensors"
        tensors = load_file(source)
        with safe_open(source, "pt") as file:
            metadata = dict(file.metadata())
        change(tensors, metadata)
        save_file(tensors, path, metadata=metadata)
        return path

    return write


@pytest.mark.parametrize("attention", ["auto", "math"])
@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_of_a_golden_step_agrees(name: str, attention: str) -> None:
    report = check(GOLDEN / f"{name}.safetensors", attention=attention)
    assert report.passed, "\n".join(report.lines())
    assert max(family.error for family in report.families) < 1e-5
    assert not report.uncompared
    found = {family.name for family in report.families}
    assert found == set(FAMILIES) - ({"EMA"} if name == "distill" else set())
    compared = sum(family.count for family in report.families)
    assert compared == len(load_file(GOLDEN / f"{name}.safetensors"))


def test_float64_agrees_and_bfloat16_is_really_used() -> None:
    path = GOLDEN / "video.safetensors"
    assert check(path, dtype="float64").passed
    half = check(path, dtype="bfloat16")
    assert not half.passed
    errors = {family.name: family.error for family in half.families}
    assert 1e-3 < errors["context features"] < 5e-2
    assert errors["loss"] < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_agrees() -> None:
    for name in NAMES:
        assert check(GOLDEN / f"{name}.safetensors", device="cuda").passed


def test_the_report_says_what_was_compared_and_what_cannot_be() -> None:
    report = check(GOLDEN / "distill.safetensors")
    assert "predictor.mask_tokens.1" in report.unused
    assert "target.patch_embed_img.proj.weight" in report.unused
    assert "encoder.norms_block.0.weight" in report.unused
    assert "encoder.norms_block.3.weight" not in report.unused
    lines = report.lines()
    assert any(line.startswith("gradients") and "grad." in line for line in lines)
    assert lines[-1].endswith("distill.safetensors: passed")


def test_a_prediction_on_its_target_takes_the_recorded_sign(
    rewritten: Callable[[str, Rewrite], Path],
) -> None:
    """The gradient of L1 jumps there, so that rounding would decide whether a file passes."""

    def cross(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        rows = tensors["predict_index.0"][..., None]
        difference = tensors["z_pred.0"] - tensors["targets_normalised"].take_along_dim(rows, 1)
        nearest = difference.abs().argmin()
        tensors["z_pred.0"].view(-1)[nearest] -= 1.01 * difference.view(-1)[nearest]

    path = rewritten("video", cross)
    report = check(path, tolerance=2e-4)
    assert report.ties == 1
    assert any("signs as recorded: 1" in line for line in report.lines())
    # The recorded gradients have the other sign, which is all that is wrong with this file.
    assert [f.name for f in report.families if f.error > 2e-4] == ["gradients"]
    assert check(GOLDEN / "video.safetensors", tolerance=2e-4).ties == 0


# One of each kind of tensor that a file holds.
ALTERED = (
    "clip", "context_index.1", "predict_index.0", "encoder.blocks.3.mlp.fc1.weight",
    "encoder.video_mod_embed", "encoder.norms_block.1.bias", "target.blocks.7.attn.proj.weight",
    "target.norms_block.3.weight", "predictor.mask_tokens.0", "predictor.predictor_proj.weight",
    "context_features.0", "target_features", "targets_normalised", "z_pred.1", "z_context.0",
    "distance_sqrt.1", "loss_pred", "loss_context", "loss_context_unweighted", "loss",
    "grad.encoder.blocks.0.norm1.bias", "grad.predictor.mask_tokens.0", "inference_features",
    "after_adamw.encoder.blocks.0.attn.qkv.weight", "after_ema.target.blocks.0.attn.qkv.weight",
)  # fmt: skip


@pytest.mark.parametrize("name", ALTERED)
def test_one_altered_number_fails(rewritten: Callable[[str, Rewrite], Path], name: str) -> None:
    def alter(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        tensor = tensors[name].flatten()
        # An index moves by one; results by a thousandth of the largest; inputs by a tenth of it.
        moves = name.split(".")[0] in ("clip", "encoder", "target", "predictor")
        share = 0.1 if moves else 1e-3
        middle = len(tensor) // 2
        tensor[middle] += tensor.abs().max() * share if tensor.is_floating_point() else 1

    report = check(rewritten("video", alter))
    assert not report.passed
    assert report.lines()[-1].endswith("FAILED")


@pytest.mark.parametrize(
    "name", ["clip", "loss", "grad.encoder.blocks.2.norm1.weight", "predictor.mask_tokens.1"]
)
def test_a_nan_anywhere_fails(rewritten: Callable[[str, Rewrite], Path], name: str) -> None:
    def poison(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        tensors[name].view(-1)[0] = torch.nan

    assert not check(rewritten("video", poison)).passed


def test_a_tensor_nobody_compares_fails(rewritten: Callable[[str, Rewrite], Path]) -> None:
    def add(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        tensors["attention_map.0"] = torch.zeros(3)

    report = check(rewritten("video", add))
    assert report.uncompared == ("attention_map.0",)
    assert not report.passed
    assert "not compared: attention_map.0" in report.lines()


def test_gradients_missing_on_either_side_fail_unless_zero(
    rewritten: Callable[[str, Rewrite], Path],
) -> None:
    absent, unknown = "grad.encoder.blocks.0.norm1.bias", "grad.encoder.img_mod_embed"

    def drop(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        del tensors[absent]

    def invent(value: float) -> Rewrite:
        def change(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
            tensors[unknown] = torch.full((1, 1, 32), value)

        return change

    dropped = check(rewritten("video", drop))
    assert not dropped.passed
    assert any(family.tensor == absent for family in dropped.families)
    assert not check(rewritten("video", invent(1e-4))).passed
    assert check(rewritten("video", invent(0.0))).passed


def _without(key: str) -> Rewrite:
    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        metadata.pop(key, None)
        tensors.pop(key, None)

    return change


def _with(key: str, value: str) -> Rewrite:
    def change(_: dict[str, Tensor], metadata: dict[str, str]) -> None:
        metadata[key] = value

    return change


def _renamed(old: str, new: str) -> Rewrite:
    def change(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        tensors[new] = tensors.pop(old)

    return change


def _index_beyond(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
    tensors["predict_index.0"][0, -1] = 100


def _shorter(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
    tensors["z_pred.0"] = tensors["z_pred.0"][:, 1:].contiguous()


def _no_update(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
    for name in [name for name in tensors if name.startswith("after_ema")]:
        del tensors[name]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_without("heads"), ["metadata heads", "None"]),
        (_with("heads", "5"), ["heads", "divisor of 32", "5"]),
        (_with("levels", "many"), ["metadata levels", "'many'"]),
        (_with("levels", "2.5"), ["metadata levels", "2.5"]),
        (_with("levels", "9"), ["9 levels"]),
        (_with("width", "64"), ["metadata width", "64", "32"]),
        (_with("offset", "perhaps"), ["metadata offset", "'perhaps'"]),
        (_without("clip"), ["no tensor clip"]),
        (_without("loss"), ["no tensor loss"]),
        (_without("distance_sqrt.1"), ["no tensor distance_sqrt.1"]),
        (_without("context_index.1"), ["predict_index", "2 and 1"]),
        (_renamed("encoder.blocks.3.norm1.bias", "encoder.blocks.3.norm.bias"), ["norm1.bias"]),
        (_without("predictor.predictor_proj.bias"), ["predictor", "predictor_proj.bias"]),
        (_index_beyond, ["predict_index.0", "0 to 99", "100"]),
        (_shorter, ["z_pred.0", "[2, 71, 128]"]),
        (_no_update, ["after_ema"]),
    ],
)
def test_a_file_that_is_no_golden_step_is_named_in_one_line(
    rewritten: Callable[[str, Rewrite], Path], change: Rewrite, words: list[str]
) -> None:
    path = rewritten("video", change)
    with pytest.raises(ValueError, match=path.name) as caught:
        check(path)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    bare, torn, missing = (tmp_path / f"{n}.safetensors" for n in ("bare", "torn", "missing"))
    save_file({"clip": torch.zeros(1)}, bare)
    torn.write_bytes((GOLDEN / "video.safetensors").read_bytes()[:5000])
    for path, words in ((bare, "no metadata"), (torn, "safetensors"), (missing, "no such file")):
        with pytest.raises(ValueError, match=words):
            check(path)


def test_options_that_do_not_exist_are_refused() -> None:
    path = GOLDEN / "video.safetensors"
    with pytest.raises(ValueError, match=r"dtype: expected one of float32.*'float8'"):
        check(path, dtype="float8")
    with pytest.raises(ValueError, match="attention: expected one of"):
        check(path, attention="quick")
    absent = [] if torch.cuda.is_available() else ["cuda"]
    for device in ("abacus", "meta", *absent):
        with pytest.raises(ValueError, match=f"device: '{device}' cannot be used here"):
            check(path, device=device)
    with pytest.raises(ValueError, match="tolerance: expected a positive number"):
        check(path, tolerance=0.0)
