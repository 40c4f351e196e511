"""The launch files start our command as torchrun takes it, and the Slurm script saves and queues
again. Slurm's own commands are stand-ins here; bash, signals and torchrun's parser are real."""

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from torch.distributed.run import get_args_parser

from fastjepa.cli import app
from fastjepa.config.load import load_recipe

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "configs/launch"
RECIPE = "configs/vitl16/pretrain-256px-16f.yaml"
JOB_FOR_TWO_NODES = {
    "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "8",
}  # fmt: skip

# What the stand-ins do. `torchrun` waits for a signal, takes a moment to save, and fails as the
# real one does after it; or it ends at once with the code asked for.
STAND_INS = {
    "scontrol": """
        echo "scontrol $*" >> log
        [[ $1 != show ]] || { echo node1; sleep 0.2; echo node2; }
    """,
    "scancel": """
        echo "scancel $*" >> log
        kill -TERM "$(cat torchrun.pid)"
    """,
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        "$@"
    """,
    "torchrun": """
        printf '%s\\n' "$@" > torchrun.args
        [[ -z ${END_WITH:-} ]] || exit "$END_WITH"
        trap 'sleep 0.5; echo saved >> log; exit 1' TERM
        echo $$ > torchrun.new && mv torchrun.new torchrun.pid
        while :; do sleep 0.1; done
    """,
}


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Any]:
    """Starts the Slurm script in a folder of its own, with the stand-ins first on the path."""
    for name, body in STAND_INS.items():
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(f"#!/bin/bash\n{body}")
        command.chmod(0o755)
    started: list[subprocess.Popen[str]] = []

    def start(*words: str, **environment: str) -> subprocess.Popen[str]:
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        job = subprocess.Popen(
            ["bash", str(LAUNCH / "slurm.sbatch"), *words],
            cwd=tmp_path, env={**os.environ, **JOB_FOR_TWO_NODES, **environment, "PATH": path},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        started.append(job)
        return job

    yield start
    for job in started:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
        job.communicate()


def log(folder: Path) -> list[str]:
    return (folder / "log").read_text().splitlines()


def wait_for(file: Path) -> None:
    for _ in range(1200):
        if file.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{file.name} never came")


def check_command(arguments: list[str]) -> Any:
    """What torchrun makes of its arguments, once the rest is found to be a command of ours."""
    parsed = get_args_parser().parse_args(arguments)
    assert parsed.module
    assert parsed.training_script == "fastjepa.cli"
    command, recipe, *overrides = parsed.training_script_args
    assert command in typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert load_recipe(ROOT / recipe, overrides).engine.kind == "deepspeed"
    return parsed


@pytest.mark.parametrize("script", [*LAUNCH.glob("*.sbatch")], ids=lambda p: p.name)
def test_scripts_are_good_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_slurm_starts_torchrun_on_every_node(slurm: Any, tmp_path: Path) -> None:
    job = slurm(RECIPE, "train.steps=10", END_WITH="0")
    assert job.wait(timeout=120) == 0
    parsed = check_command((tmp_path / "torchrun.args").read_text().splitlines())
    assert (parsed.nnodes, parsed.nproc_per_node) == ("2", "8")
    assert re.fullmatch(r"node1:2\d{4}", parsed.rdzv_endpoint)
    assert parsed.training_script_args[1:] == [RECIPE, "engine.kind=deepspeed", "train.steps=10"]
    assert not any(line.startswith("scontrol requeue") for line in log(tmp_path))


def test_slurm_passes_on_a_failure(slurm: Any, tmp_path: Path) -> None:
    job = slurm(RECIPE, END_WITH="7")
    assert job.wait(timeout=120) == 7
    assert not any(line.startswith("scontrol requeue") for line in log(tmp_path))
    assert slurm().wait(timeout=120) == 2


@pytest.mark.parametrize("first", [signal.SIGUSR1, signal.SIGTERM])
def test_slurm_saves_before_it_queues_again(
    slurm: Any, tmp_path: Path, first: signal.Signals
) -> None:
    """Slurm may send more than one signal; none cuts the saving short."""
    job = slurm(RECIPE)
    wait_for(tmp_path / "torchrun.pid")
    job.send_signal(first)
    time.sleep(0.2)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=120) == 0
    done = log(tmp_path)
    assert done.count("scancel --signal=TERM 4711.0") == 1
    assert done.index("saved") < done.index("scontrol requeue 4711")
    assert done.count("scontrol requeue 4711") == 1


def test_slurm_and_kubernetes_leave_time_to_save() -> None:
    script = (LAUNCH / "slurm.sbatch").read_text()
    (lead,) = re.findall(r"--signal=B:USR1@(\d+)", script)
    (patience,) = re.findall(r"--shutdown-timeout=(\d+)", script)
    assert int(patience) < int(lead)
    for node in nodes():
        parsed = check_command(node["containers"][0]["command"][1:])
        assert parsed.shutdown_timeout < node["terminationGracePeriodSeconds"]


def nodes() -> list[dict[str, Any]]:
    job = yaml.safe_load((LAUNCH / "pytorchjob.yaml").read_text())
    return [one["template"]["spec"] for one in job["spec"]["pytorchReplicaSpecs"].values()]


def test_the_kubernetes_job_has_what_the_operator_asks_for() -> None:
    job = yaml.safe_load((LAUNCH / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert set(job["spec"]["pytorchReplicaSpecs"]) == {"Master", "Worker"}
    for node in nodes():
        (container,) = node["containers"]
        assert container["name"] == "pytorch"
        assert container["command"][0] == "torchrun"
        gpus = container["resources"]["limits"]["nvidia.com/gpu"]
        assert str(gpus) == job["spec"]["nprocPerNode"]
        assert {v["name"] for v in node["volumes"]} == {
            mount["name"] for mount in container["volumeMounts"]
        }


def test_commands_on_the_launch_page_are_good() -> None:
    page = (LAUNCH / "README.md").read_text(encoding="utf-8")
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^ {4}(.+)$", page, re.M)]
    started = [words for words in commands if words[0] == "torchrun"]
    assert len(started) >= 2
    for words in started:
        check_command(words[1:])
    for words in commands:
        for word in words:
            if word.startswith("configs/"):
                assert (ROOT / word).exists(), word
