"""A whole training step of ours against the official one, by model, size and batch.

    python benchmarks/step_vs_reference.py --reference PATH/TO/vjepa2 --model vit_small --size 256
    --json out.json

That is `fastjepa bench step configs/demo.yaml` with the keys that these options stand for, on
videos alone; what else is given is that command's (`--rounds 9`, `--compiled`, `KEY=VALUE`).
"""

import argparse
import sys
from pathlib import Path

from fastjepa.cli import main

RECIPE = Path(__file__).parents[1] / "configs/demo.yaml"


def command(argv: list[str]) -> list[str]:
    """The words of `fastjepa` for this script's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", required=True, help="an official V-JEPA 2 checkout")
    parser.add_argument("--model", default="vit_small")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--pred-depth", type=int, default=12)
    parser.add_argument("--dtype", default="float32", help="ours")
    args, rest = parser.parse_known_args(argv)
    keys = {
        "model.name": args.model, "data.crop": args.size, "data.frames": args.frames,
        "data.batch": args.batch, "model.predictor.depth": args.pred_depth,
        "model.predictor.width": 384, "model.predictor.heads": 12, "data.image": "[]",
        "engine.dtype": args.dtype,
    }  # fmt: skip
    overrides = [f"{key}={value}" for key, value in keys.items()]
    return ["bench", "step", str(RECIPE), *overrides, "--reference", args.reference, *rest]


if __name__ == "__main__":
    main(command(sys.argv[1:]))
