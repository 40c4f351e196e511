"""Going back to the last good checkpoint past data on which the training diverged.

Several skipped steps in a row: the run loads the newest checkpoint from before them, leaves out the
data of the steps since, and goes on. What was left out is part of every later checkpoint, so that a
restart takes the same data as a run that was never stopped.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastjepa.checkpoint.layout import is_complete, newest_first, step_of


class DivergedError(Exception):
    """The run has to go back to the checkpoint at `path`; the loop catches it."""

    def __init__(self, path: Path, skipped: int) -> None:
        super().__init__(f"back to {path}")
        self.path, self.skipped = path, skipped


@dataclass
class Returns:
    """The returns of a run so far: each took it from step `at` back to step `to`.

    `after` steps skipped in a row ask for one (None: never), at most `most` times.
    """

    after: int | None
    most: int
    made: list[dict[str, int]] = field(default_factory=list)

    @property
    def left_out(self) -> int:
        """Steps whose data has been left out."""
        return sum(one["at"] - one["to"] for one in self.made)

    def data_step(self, step: int) -> int:
        """The step whose data `step` takes: the plan counts data as if nothing had been left
        out."""
        return step + self.left_out

    def asked_for(self, skipped_in_a_row: int) -> bool:
        """Whether so many skipped steps ask for a return, and one more may be made."""
        enough = self.after is not None and skipped_in_a_row >= self.after
        return enough and len(self.made) < self.most

    def target(self, folder: Path, step: int) -> Path | None:
        """The newest complete checkpoint of at most `step` steps; None if there is none."""
        good = (
            path for path in newest_first(folder) if step_of(path) <= step and is_complete(path)
        )
        return next(good, None)

    def note(self, at: int, to: int) -> None:
        """A return has taken the run from step `at` to step `to`."""
        self.made.append({"at": at, "to": to})

    def state(self) -> dict[str, Any]:
        """For a checkpoint's state."""
        return {"returns": self.made}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what a checkpoint's state says; those of older versions know of none."""
        made: Iterable[Mapping[str, int]] = state.get("returns", ())
        self.made = [dict(one) for one in made]

    def metrics(self) -> dict[str, float]:
        """For a logged step, once there are any or might be."""
        if self.after is None and not self.made:
            return {}
        return {"returns": len(self.made), "steps_left_out": self.left_out}
