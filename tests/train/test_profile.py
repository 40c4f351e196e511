"""`profile.steps` in a run: a trace of these steps with every stage of them."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

from .conftest import run


def test_a_run_writes_a_trace_with_every_stage(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    code, out = run(write_recipe(), "train.steps=6", "profile.steps=[2,3]")
    assert code == 0, out
    path = tmp_path / "run/profile/steps-2-3.rank-0.json.gz"
    assert f"{path}: Chrome trace" in out
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    ours = [e["name"].removeprefix("fastjepa: ") for e in events if "fastjepa: " in e["name"]]
    # In each of two steps: a batch of videos, whose second mask group goes through the predictor by
    # halves after the first, and one of images.
    wanted = {"data wait": 2, "target": 2, "context": 2, "predictor": 4, "loss": 4, "backward": 6,
              "optimizer": 1, "EMA": 1}  # fmt: skip
    assert {name: ours.count(name) for name in ours} == {n: 2 * k for n, k in wanted.items()}
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(row["mfu"] > 0 and row["flops_per_second"] > 0 for row in rows)
    assert all(row["ema_distance"] > 0 for row in rows)
