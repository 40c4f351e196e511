"""Tokens that truncation drops: the reference cuts each index set to the smallest of the batch.

    python benchmarks/truncation.py --json truncation.json

Masks of the released video groups are drawn for many steps and several batch sizes, on the grids of
the two released stages; a share is of the tokens that a clip would keep by itself.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean

from fastjepa.bench.shapes import VIDEO_GROUPS
from fastjepa.masking.batch import MaskMaker

STEPS, BATCHES = 64, (1, 2, 4, 8, 16, 24, 48)
GRIDS = {"256 px, 16 frames": (8, 16, 16), "384 px, 64 frames": (32, 24, 24)}


def dropped(grid: tuple[int, int, int], batch: int) -> dict[str, float]:
    """Shares of context and of predicted tokens that a batch loses, over all groups."""
    cut = MaskMaker(VIDEO_GROUPS, grid, batch, seed=0, weigh=False)
    whole = MaskMaker(VIDEO_GROUPS, grid, batch, seed=0, weigh=False, truncate=False)
    kept: dict[str, list[tuple[int, int]]] = {"context": [], "predict": []}
    for step in range(max(4, STEPS // batch)):
        for kind, counts in kept.items():
            here, there = (
                sum(index.numel() for index in getattr(maker(step), kind)) for maker in (cut, whole)
            )
            counts.append((here, there))
    return {kind: 1 - fmean(c / w for c, w in counts) for kind, counts in kept.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="where to write the shares")
    args = parser.parse_args()
    found = {
        name: {batch: dropped(grid, batch) for batch in BATCHES} for name, grid in GRIDS.items()
    }
    for name, shares in found.items():
        print(name)
        for batch, share in shares.items():
            text = ", ".join(f"{kind} {value:.1%}" for kind, value in share.items())
            print(f"  batch {batch}: {text}")
    args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
