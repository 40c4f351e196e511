"""kill -9 to a rank at some random moments: every resume continues the run exactly.

benchmarks/kill_training.py does it a hundred times, at three ZeRO stages.
"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from ..processes import run_ranks

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_bits_of_one_that_was_not(
    tmp_path: Path,
) -> None:
    out = tmp_path / "kills.json"
    run_ranks(
        [
            sys.executable, "benchmarks/kill_training.py", "--kills", "3", "--stages", "2",
            "--json", str(out), "--timeout", "200",
        ],
        seconds=450,
    )  # fmt: skip
    found = json.loads(out.read_text())
    assert (found["kills"], found["failed"]) == (3, 0)
    assert found["runs_to_their_end"] >= 1
