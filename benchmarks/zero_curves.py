"""Loss curves of ZeRO stages 0 to 3 at 1, 2 and 4 ranks beside those of one process.

    python benchmarks/zero_curves.py --steps 50 --json zero_curves.json

The ranks run `tests/distributed/worker.py`: steps of videos and images, clipped, with one step that
an infinity on one rank skips, in float32 and in bfloat16, and in the same process group's first
rank the same steps in one process.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

WORKER = Path(__file__).parents[1] / "tests/distributed/worker.py"
TOLERANCE = {"full": 1e-5, "half": 1e-2}
CALLED = {"full": "float32", "half": "bfloat16"}


def curves(ranks: int, steps: int) -> dict[str, Any]:
    """What the worker found at one number of ranks, by dtype and stage."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        subprocess.run(
            [*launch, str(ranks), str(WORKER), str(out), str(steps)], check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        found: dict[str, Any] = json.loads(out.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    runs = []
    for ranks in arguments.ranks:
        for name, case in curves(ranks, arguments.steps).items():
            kind, _, stage = name.partition("/")
            run = {"ranks": ranks, "stage": int(stage), "dtype": CALLED[kind]}
            run["loss_error"] = case["loss_error"]
            for key in ("losses", "losses_of_one_process"):
                run[key] = [loss if math.isfinite(loss) else None for loss in case[key]]
            runs.append(run)
            fits = "within" if case["loss_error"] <= TOLERANCE[kind] else "NOT within"
            print(
                f"{ranks} ranks, stage {stage}, {run['dtype']}: largest relative difference "
                f"{case['loss_error']:.1e}, {fits} {TOLERANCE[kind]:g}",
                flush=True,
            )
    if arguments.json:
        facts = {"steps": arguments.steps, "torch": torch.__version__, "runs": runs}
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
