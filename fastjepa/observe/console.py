"""What a person sees of a run: a progress bar on a terminal, a line a logged step elsewhere.

Both show the same things: step, loss and its terms, clips a second, share of time spent waiting for
data, memory, time left. Nothing is drawn from a thread: the screen changes when `update`, `say` or
`warn` is called.
"""

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from rich.console import Console as Terminal
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text


class Console:
    """A run's voice on `stream` (standard output by default).

    A terminal that can move its cursor gets the bar, anything else (a pipe, a file, TERM=dumb)
    plain lines.
    """

    def __init__(
        self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        stream = stream or sys.stdout
        bar = stream.isatty()
        self._terminal = Terminal(
            file=stream, force_terminal=bar, highlight=False, markup=False, emoji=False
        )
        self._bar = bar and not self._terminal.is_dumb_terminal
        self._clock = clock
        self._live: Live | None = None
        self._metrics: dict[str, float] = {}
        self._total = self._done = 0
        self._started = clock()

    def start(self, total: int, done: int) -> None:
        """Begin showing a run of `total` steps of which `done` are behind it."""
        self._total, self._done, self._started = total, done, self._clock()
        self._metrics = {"step": done}
        if self._bar:
            self._live = Live(
                self._screen(), console=self._terminal, auto_refresh=False, transient=False
            )
            self._live.start(refresh=True)

    def update(self, metrics: Mapping[str, float]) -> None:
        """Show a logged step under the keys of metrics.jsonl; keys left out keep their last value.

        In plain mode a line is written when the mapping holds `loss`.
        """
        self._metrics.update(metrics)
        if self._live is not None:
            self._live.update(self._screen(), refresh=True)
        elif "loss" in metrics:
            parts = [f"step {self._step}/{self._total}", *facts(self._metrics)]
            self._print(Text("  ".join([*parts, f"left {self._left()}"])))

    def say(self, text: str) -> None:
        """Write a line of information above the bar."""
        self._print(Text(text))

    def warn(self, text: str) -> None:
        """Write a line that starts with `warning:` above the bar."""
        self._print(Text.assemble(("warning: ", "bold yellow"), text))

    def close(self) -> None:
        """Leave the bar as it stands and give the cursor back; a second call does nothing."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, text: Text) -> None:
        self._terminal.print(text, soft_wrap=True)

    @property
    def _step(self) -> int:
        return int(self._metrics.get("step", self._done))

    def _left(self) -> str:
        steps = self._step - self._done
        if steps <= 0:
            return "-:--"
        return duration((self._clock() - self._started) / steps * (self._total - self._step))

    def _screen(self) -> Group:
        row = Table.grid(padding=(0, 1), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True, justify="right")
        row.add_row(
            f"step {self._step}/{self._total}",
            ProgressBar(total=max(self._total, 1), completed=self._step),
            f"left {self._left()}",
        )
        return Group(row, Text("  ".join(facts(self._metrics)), style="dim"))


def facts(metrics: Mapping[str, float]) -> list[str]:
    """Short phrases of a logged step in reading order; what `metrics` lacks is left out."""
    found = []
    if "loss" in metrics:
        found.append(f"loss {metrics['loss']:.4f}{_terms(metrics)}")
    if "clips_per_second" in metrics:
        found.append(f"{metrics['clips_per_second']:.3g} clips/s")
    if "data_wait" in metrics:
        found.append(f"data wait {metrics['data_wait']:.0%}")
    if "memory_gib" in metrics:
        found.append(f"{metrics['memory_gib']:.1f} GiB")
    if metrics.get("skipped", 0) > 0:
        found.append(f"skipped {metrics['skipped']:.0f}")
    return found


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as 1:02:03, or 2:03 below an hour; `-:--` when not finite."""
    if not math.isfinite(seconds) or seconds < 0:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _terms(metrics: Mapping[str, float]) -> str:
    if "loss_predict" not in metrics:
        return ""
    terms = f"predict {metrics['loss_predict']:.4f}"
    if "loss_context" in metrics:
        weight = metrics.get("context_weight", 1.0)
        terms += f" + {weight:.2g} x context {metrics['loss_context']:.4f}"
    return f" = {terms}"
