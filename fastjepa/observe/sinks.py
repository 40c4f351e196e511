"""Where a run's metrics go: metrics.jsonl always, TensorBoard, and Weights & Biases when asked for.

A metrics mapping holds flat keys (`loss`, `loss_predict/level11`, ...) and `step`, the number of
finished optimizer steps. Each sink is told on opening how many steps are done, so that a resumed
run goes on where its checkpoint stands and what an interrupted run logged beyond it is dropped.
"""

import json
import math
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from fastjepa.durable import atomic_file

Metrics = Mapping[str, float]


class Sink(Protocol):
    """Takes the metrics of one logged step after another."""

    def write(self, metrics: Metrics) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class Gallery(Protocol):
    """A sink that shows pictures, too."""

    def picture(self, name: str, picture: Image.Image, step: int) -> None: ...


class JsonlSink:
    """One JSON object a logged step, appended and flushed line by line.

    A number that is not finite is written as null, which JSON has (NaN and Infinity it has not). On
    opening, lines of steps beyond `done` are dropped, and a half-written last line; the file is
    replaced whole or left alone. Raises ValueError naming file and line when another line is no
    JSON object with a whole `step`, and on a step that is not beyond the last one: the file holds
    one line a step.
    """

    def __init__(self, path: Path, done: int = 0) -> None:
        self._path = path
        self._last = self._drop_beyond(done)
        self._file = open(path, "a", encoding="utf-8", newline="\n")  # noqa: SIM115 (closed by close)

    def write(self, metrics: Metrics) -> None:
        step = _step(metrics)
        if step <= self._last:
            raise ValueError(f"{self._path}: step {step} after step {self._last}; steps must grow")
        row = {"step": step} | {
            key: _json_number(value) for key, value in metrics.items() if key != "step"
        }
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        self._last = step

    def close(self) -> None:
        self._file.close()

    def _drop_beyond(self, done: int) -> int:
        if not self._path.exists():
            return -1
        content = self._path.read_text(encoding="utf-8", errors="replace")
        whole = content[: content.rfind("\n") + 1]
        kept: dict[int, str] = {}
        for number, line in enumerate(whole.splitlines(), start=1):
            step = _row(self._path, number, line)["step"]
            if step <= done:
                kept[step] = line
        text = "".join(line + "\n" for line in kept.values())
        if text != content:
            with atomic_file(self._path) as handle:
                handle.write(text.encode())
        return max(kept, default=-1)


class TensorBoardSink:
    """TensorBoard event files in `folder`; events beyond `done` of an interrupted run are purged.

    Raises ValueError when tensorboard is not installed.
    """

    def __init__(self, folder: Path, done: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise ValueError(
                f"TensorBoard files need {error.name}, which is not installed: "
                "pip install tensorboard"
            ) from error
        self._writer: Any = SummaryWriter(str(folder), purge_step=done + 1)

    def write(self, metrics: Metrics) -> None:
        step = _step(metrics)
        for key, value in metrics.items():
            if key != "step":
                self._writer.add_scalar(key, float(value), step)
        self._writer.flush()

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        pixels_HWC = np.asarray(picture.convert("RGB"))
        self._writer.add_image(name, pixels_HWC, step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Weights & Biases, under one run id kept in `folder`/wandb-id.txt for resumed runs.

    Every metric is drawn over `step`, so steps that are logged again after a resume land on their
    place. Raises ValueError when wandb is not installed.
    """

    def __init__(
        self,
        folder: Path,
        project: str,
        name: str | None = None,
        config: Mapping[str, object] | None = None,
    ) -> None:
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise ValueError(
                "Weights & Biases was asked for, but wandb is not installed: pip install wandb, "
                "or leave observe.wandb false"
            ) from error
        remembered = folder / "wandb-id.txt"
        if not remembered.exists():
            with atomic_file(remembered) as handle:
                handle.write(uuid.uuid4().hex[:12].encode())
        self._run: Any = wandb.init(
            project=project,
            name=name,
            id=remembered.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(folder),
            config=dict(config or {}),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, metrics: Metrics) -> None:
        self._run.log(dict(metrics))

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        import wandb

        self._run.log({"step": step, name: wandb.Image(picture)})

    def close(self) -> None:
        self._run.finish()


class Sinks:
    """Several sinks as one; `with` closes them, and the first error in a write stops it."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    @classmethod
    def open(
        cls,
        folder: Path,
        done: int = 0,
        *,
        wandb_project: str | None = None,
        name: str | None = None,
        config: Mapping[str, object] | None = None,
    ) -> "Sinks":
        """Open metrics.jsonl, tensorboard/ in `folder` and, given a project, Weights & Biases."""
        sinks: list[Sink] = [
            JsonlSink(folder / "metrics.jsonl", done),
            TensorBoardSink(folder / "tensorboard", done),
        ]
        if wandb_project is not None:
            sinks.append(WandbSink(folder, wandb_project, name, config))
        return cls(sinks)

    def write(self, metrics: Metrics) -> None:
        """Hand one logged step to every sink."""
        for sink in self._sinks:
            sink.write(metrics)

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        """Hand a picture of a step to every sink that shows some."""
        for sink in self._sinks:
            if isinstance(sink, Gallery):
                sink.picture(name, picture, step)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read metrics.jsonl in order; null becomes NaN, a half-written last line is left out.

    Raises ValueError naming file and line when a line is no JSON object with a whole `step`,
    FileNotFoundError when there is no file.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    rows = [
        _row(path, number, line)
        for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1)
    ]
    return [
        {key: math.nan if value is None else value for key, value in row.items()} for row in rows
    ]


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        row = None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise ValueError(
            f"{path} line {number}: expected a JSON object with a whole number `step`, "
            f"found {line[:60]!r}"
        )
    return row


def _step(metrics: Metrics) -> int:
    step = metrics.get("step")
    if step is None or step != int(step) or step < 0:
        raise ValueError(f"metrics: expected a whole `step` that is not negative, found {step!r}")
    return int(step)


def _json_number(value: float) -> float | None:
    number = value if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else None
