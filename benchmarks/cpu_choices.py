"""The choices behind products_cpu.py and attention_cpu.py, measured: each alternative in turn,
medians.

    python benchmarks/cpu_choices.py --threads 2 --json out.json

Rows are token counts of ViT-small's and ViT-tiny's steps. Prints milliseconds; the JSON holds
them with the PyTorch version.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastjepa.model import attention_cpu

PRODUCTS = ((4096, 384, 1536), (4096, 1536, 384), (1120, 384, 1536), (448, 192, 768))
SEQUENCES = ((1, 12, 2048, 32), (1, 12, 1024, 32), (1, 6, 608, 64), (4, 12, 236, 32))

_onednn = torch.ops.mkldnn
_all_keys = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def in_turn(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each call, the calls one after the other in every round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def products(rows: int, inputs: int, outputs: int, repeats: int) -> dict[str, float]:
    """A Linear layer's three products, by MKL and by oneDNN, in float32."""
    x, w, b = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    dy = torch.randn(rows, outputs)
    linear = _onednn._linear_pointwise
    return in_turn(
        {
            "forward, MKL": lambda: torch.addmm(b, x, w.t()),
            "forward, oneDNN": lambda: linear(x, w, b, "none", [], ""),
            "forward, oneDNN, copied weight": lambda: linear(
                x, w.t().contiguous().t(), b, "none", [], ""
            ),
            "input's gradient, MKL": lambda: dy @ w,
            "input's gradient, oneDNN": lambda: linear(dy, w.t(), None, "none", [], ""),
            "weight's gradient, MKL": lambda: dy.t() @ x,
            "weight's gradient, MKL, transposed": lambda: (x.t() @ dy).t().contiguous(),
            "weight's gradient, oneDNN": lambda: linear(dy.t(), x.t(), None, "none", [], ""),
        },
        repeats,
    )


def attention(shape: tuple[int, int, int, int], repeats: int) -> dict[str, float]:
    """The backward of flash attention with all keys at once, and in parts, in both dtypes."""
    calls: dict[str, Callable[[], object]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v, grad = (torch.randn(shape, dtype=dtype) for _ in range(4))
        out, lse = attention_cpu.flash_forward(q, k, v)
        name = str(dtype).removeprefix("torch.")
        calls |= {
            f"forward, {name}": lambda q=q, k=k, v=v: attention_cpu.flash_forward(q, k, v),
            f"backward, all keys, {name}": lambda a=(grad, q, k, v, out, lse): _all_keys(
                *a, 0.0, False
            ),
            f"backward, as we call it, {name}": lambda a=(grad, q, k, v, out, lse): (
                attention_cpu.flash_backward(*a)
            ),
        }
    return in_turn(calls, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = {f"product {size}": products(*size, args.repeats) for size in PRODUCTS}
    found |= {f"attention {shape}": attention(shape, args.repeats) for shape in SEQUENCES}
    for title, times in found.items():
        print(title)
        for name, milliseconds in times.items():
            print(f"  {name:36}{milliseconds:10.3f} ms")
    if args.json:
        record = {"torch": torch.__version__, "threads": args.threads, "milliseconds": found}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
