"""The command line as a person types it: real processes, exit codes, one line for a mistake."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"


def fastjepa(*words: object) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "fastjepa.cli", *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def altered(source: Path, target: Path, name: str) -> None:
    with safe_open(source, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    tensors[name].view(-1)[0] += 0.01
    save_file(tensors, target, metadata)


def test_parity_passes_on_a_golden_step_and_fails_on_an_altered_one(tmp_path: Path) -> None:
    code, out, _ = fastjepa("parity", GOLDEN / "image.safetensors")
    assert code == 0
    assert "gradients" in out
    wrong = tmp_path / "wrong.safetensors"
    altered(GOLDEN / "image.safetensors", wrong, "grad.predictor.predictor_norm.weight")
    assert fastjepa("parity", wrong)[0] == 1
    assert fastjepa("parity", GOLDEN / "README.md")[0] == 2


def test_config_show_speaks_text_and_json() -> None:
    code, out, _ = fastjepa("config", "show", "configs/vitl16/pretrain-256px-16f.yaml")
    assert code == 0
    assert "304.7 M" in out
    code, out, _ = fastjepa("config", "show", "configs/demo.yaml", "--json")
    assert code == 0
    assert isinstance(json.loads(out), dict)


def test_config_import_writes_a_recipe_that_loads(tmp_path: Path) -> None:
    official = tmp_path / "official.yaml"
    official.write_text(
        "app: vjepa_2_1\nfolder: /runs/x\n"
        "data: {datasets: [/data/a.csv], dataset_fpcs: [16], batch_size: 2, crop_size: 256,"
        " patch_size: 16, tubelet_size: 2, fps: 4}\n"
        "mask: [{num_blocks: 8, spatial_scale: [0.15, 0.15], temporal_scale: [1.0, 1.0],"
        " aspect_ratio: [0.75, 1.5]}]\n"
        "model: {model_name: vit_large, pred_depth: 24, use_rope: true}\n"
        "optimization: {epochs: 2, ipe: 10, lr: 1.0e-3, start_lr: 1.0e-4, final_lr: 1.0e-3,"
        " warmup: 1, weight_decay: 0.04, final_weight_decay: 0.04, ema: [0.9, 0.9]}\n"
    )
    out = tmp_path / "recipe.yaml"
    code, text, _ = fastjepa("config", "import", official, "--out", out)
    assert code == 0
    assert "renamed" in text
    assert fastjepa("config", "show", out)[0] == 0
    assert fastjepa("config", "import", official, "--out", out)[0] == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "no-such.yaml"], "no-such.yaml"),
        (["config", "show", "configs/demo.yaml", "data.fps=0"], "data.fps"),
        (["features", "no-such-run", "x.mp4"], "no-such-run"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words: list[str], said: str) -> None:
    code, _, err = fastjepa(*words)
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert said in err


def test_doctor_finds_this_machine_healthy() -> None:
    code, out, _ = fastjepa("doctor")
    assert code == 0
    assert "torch" in out


def test_the_installed_command_is_there() -> None:
    found = shutil.which("fastjepa", path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip("run from a checkout without an install")
    assert subprocess.run([found, "--help"], capture_output=True).returncode == 0
