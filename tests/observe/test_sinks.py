"""metrics.jsonl holds one line a step whatever happened; the other sinks get the same numbers."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastjepa.observe.sinks import JsonlSink, Sinks, TensorBoardSink, WandbSink, read_metrics


def row(step: int, **more: float) -> dict[str, float]:
    return {"step": step, "loss": 1.0 / step, "loss_predict/level11": 0.5} | more


def write(path: Path, steps: range, done: int = 0) -> None:
    sink = JsonlSink(path, done)
    for step in steps:
        sink.write(row(step))
    sink.close()


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_each_step_is_one_json_object(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(10, 40, 10))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [row(10), row(20), row(30)]
    assert next(iter(lines[0])) == "step"
    assert read_metrics(path) == lines


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.write(row(1))
    assert steps(path) == [1]
    sink.close()


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.write(row(1, loss=math.nan, grad_norm=math.inf, lr=-math.inf))
    sink.close()

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    line = json.loads(path.read_text(), parse_constant=refuse)
    assert line["loss"] is line["grad_norm"] is line["lr"] is None
    assert math.isnan(read_metrics(path)[0]["loss"])


@given(st.lists(st.integers(1, 60), unique=True).map(sorted), st.integers(0, 60), st.integers(0, 9))
def test_a_resume_leaves_one_line_a_step(
    tmp_path_factory: pytest.TempPathFactory, logged: list[int], done: int, cut: int
) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    write(path, logged)  # type: ignore[arg-type]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - cut])
    write(path, range(done + 1, 70), done)
    kept = [s for s in logged if s <= done]
    if cut and kept and kept[-1] == logged[-1]:
        kept.pop()
    assert steps(path) == kept + list(range(done + 1, 70))
    assert os.listdir(path.parent) == ["metrics.jsonl"]


def test_a_run_killed_while_it_writes_can_go_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    program = (
        "import itertools, pathlib, sys\n"
        "from fastjepa.observe.sinks import JsonlSink\n"
        "sink = JsonlSink(pathlib.Path(sys.argv[1]))\n"
        "for step in itertools.count(1):\n"
        "    sink.write({'step': step, 'loss': 1.0, 'x' * 5000: 0.0})\n"
        "    if step == 20: print('there', flush=True)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE)
    assert run.stdout is not None
    assert run.stdout.readline() == b"there\n"
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    write(path, range(16, 19), 15)
    assert steps(path) == list(range(1, 19))


def test_a_resume_that_drops_nothing_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    before = path.stat().st_ino
    JsonlSink(path, 3).close()
    assert path.stat().st_ino == before


def test_a_foreign_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nhello\n{"step": 2}\n')
    for attempt in (JsonlSink, read_metrics):
        with pytest.raises(ValueError, match=r"metrics\.jsonl line 2: .*'hello'"):
            attempt(path)
    assert path.read_text().startswith('{"step": 1}\nhello')


@pytest.mark.parametrize("metrics", [{"loss": 1.0}, {"step": 1.5}, {"step": -1}])
def test_metrics_without_a_whole_step_are_refused(
    tmp_path: Path, metrics: dict[str, float]
) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="whole `step`"):
        sink.write(metrics)
    sink.close()


def test_a_step_cannot_be_written_twice(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write(row(5))
    with pytest.raises(ValueError, match="step 5 after step 5"):
        sink.write(row(5))
    sink.close()


def test_tensorboard_holds_the_same_numbers_and_purges_on_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def run(steps: range, done: int, loss: float) -> None:
        sink = TensorBoardSink(tmp_path, done)
        for step in steps:
            sink.write(row(step, loss=loss))
        sink.close()

    run(range(1, 9), 0, 1.0)
    run(range(5, 7), 4, 2.0)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    losses = [(e.step, e.value) for e in events.Scalars("loss")]
    assert losses == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 2.0), (6, 2.0)]
    assert "loss_predict/level11" in events.Tags()["scalars"]


def test_all_sinks_at_once(tmp_path: Path) -> None:
    with Sinks.open(tmp_path) as sinks:
        sinks.write(row(1))
    with Sinks.open(tmp_path, done=1) as sinks:
        sinks.write(row(2))
    assert steps(tmp_path / "metrics.jsonl") == [1, 2]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_an_unwritable_folder_is_the_systems_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        JsonlSink(tmp_path / "nowhere" / "metrics.jsonl")


def without(module: str, statement: str) -> str:
    """What `statement` says in a Python that has no `module`."""
    program = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from pathlib import Path\n"
        f"from fastjepa.observe.sinks import TensorBoardSink, WandbSink\n{statement}\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 1
    return run.stderr.splitlines()[-1]


def test_a_missing_package_is_named_with_its_remedy(tmp_path: Path) -> None:
    words = without("wandb", f"WandbSink(Path({str(tmp_path)!r}), 'project')")
    assert "ValueError" in words
    assert "pip install wandb" in words
    words = without("tensorboard", f"TensorBoardSink(Path({str(tmp_path)!r}))")
    assert "ValueError" in words
    assert "pip install tensorboard" in words


def test_wandb_goes_on_under_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = set()
    for step in (1, 2):
        sink = WandbSink(tmp_path, "fastjepa", "trial", {"seed": 0})
        sink.write(row(step))
        sink.close()
        ids.add((tmp_path / "wandb-id.txt").read_text())
    assert len(ids) == 1
    assert len(list(tmp_path.glob(f"wandb/offline-run-*-{ids.pop()}*"))) >= 1
