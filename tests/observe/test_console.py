"""The same run on a pseudo-terminal and through a pipe."""

import os
import pty
import re
import subprocess
import sys

import pytest

from fastjepa.observe.console import duration, facts

PROGRAM = """
import sys
from fastjepa.observe.console import Console
console = Console()
console.say("run folder: runs/[demo]")
console.start(total=40, done=10)
for step in (20, 30, 40):
    console.update({
        "step": step, "loss": 0.5, "loss_predict": 0.4, "loss_context": 0.2, "context_weight": 0.5,
        "clips_per_second": 31.25, "data_wait": 0.03, "memory_gib": 1.9,
    })
    if step == 20:
        console.warn("clip [3] is bad")
        console.update({"data_wait": 0.5})
console.close()
console.close()
console.say("done")
"""

LINE = (
    "step 20/40  loss 0.5000 = predict 0.4000 + 0.5 x context 0.2000  "
    "31.2 clips/s  data wait 3%  1.9 GiB  left 0:00"
)


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    return kept | {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"} | more


def on_a_terminal(**more: str) -> str:
    ours, theirs = pty.openpty()
    run = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=theirs, stderr=theirs, env=environment(**more)
    )
    os.close(theirs)
    said = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # Linux reports a closed terminal so.
            break
        if not piece:
            break
        said += piece
    os.close(ours)
    assert run.wait() == 0
    return said.decode()


def through_a_pipe(**more: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, env=environment(**more), check=True
    )
    assert run.stderr == b""
    return run.stdout.decode()


def test_a_pipe_gets_one_short_line_a_logged_step() -> None:
    lines = through_a_pipe().splitlines()
    assert lines == [
        "run folder: runs/[demo]",
        LINE,
        "warning: clip [3] is bad",
        LINE.replace("20/40", "30/40"),
        LINE.replace("20/40", "40/40"),
        "done",
    ]


def test_colour_forced_on_a_pipe_brings_no_bar() -> None:
    assert len(through_a_pipe(FORCE_COLOR="1").splitlines()) == 6


def test_a_terminal_gets_a_bar_that_is_redrawn() -> None:
    said = on_a_terminal(COLUMNS="100")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said)
    for step in (10, 20, 30, 40):
        assert f"step {step}/40" in plain
    assert "\x1b[1A" in said or "\x1b[2K" in said
    assert "━" in plain
    assert "loss 0.5000 = predict 0.4000 + 0.5 x context 0.2000" in plain
    assert "data wait 50%" in plain
    assert "left 0:00" in plain
    assert "warning: clip [3] is bad" in plain
    assert said.index("\x1b[?25l") < said.rindex("\x1b[?25h")
    assert plain.rstrip().endswith("done")


def test_a_terminal_without_a_cursor_gets_lines() -> None:
    said = on_a_terminal(TERM="dumb")
    assert "\x1b[" not in said
    assert LINE in said


def test_a_narrow_terminal_is_no_error() -> None:
    assert "step 40/40" in on_a_terminal(COLUMNS="30")


def test_what_is_unknown_is_left_out() -> None:
    assert facts({"step": 3}) == []
    assert facts({"loss": float("nan"), "loss_predict": 1.0}) == ["loss nan = predict 1.0000"]
    assert facts({"skipped": 0}) == []
    assert facts({"skipped": 2}) == ["skipped 2"]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3723, "1:02:03"), (float("inf"), "-:--")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words
