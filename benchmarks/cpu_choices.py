"""The choices behind products_cpu.py, attention_cpu.py and passes_cpu.py, measured: each
alternative in turn, medians; and the error that bfloat16 costs.

    python benchmarks/cpu_choices.py --threads 2 --json out.json

Rows are token counts of ViT-small's and ViT-tiny's steps. Prints milliseconds and
relative errors; the JSON holds them with the PyTorch version.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fastjepa.model import attention_cpu, passes_cpu
from fastjepa_kernels.block_passes import avx512
from fastjepa_kernels.precision import multiplies_bfloat16

PRODUCTS = ((4096, 384, 1536), (4096, 1536, 384), (1120, 384, 1536), (448, 192, 768))
ROWS = ((2048, 384), (448, 192))
SEQUENCES = (
    (1, 12, 2048, 32), (1, 12, 1024, 32), (1, 6, 608, 64), (4, 12, 236, 32), (4, 12, 100, 32),
)  # fmt: skip

_onednn = torch.ops.mkldnn
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


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
    dy, residual = torch.randn(rows, outputs), torch.randn(rows, outputs)
    linear = _onednn._linear_pointwise
    return in_turn(
        {
            "forward, MKL": lambda: torch.addmm(b, x, w.t()),
            "forward, oneDNN": lambda: linear(x, w, b, "none", [], ""),
            "forward, oneDNN, copied weight": lambda: linear(
                x, w.t().contiguous().t(), b, "none", [], ""
            ),
            "added, MKL": lambda: (residual + b).addmm_(x, w.t()),
            "added, oneDNN": lambda: linear.binary(x, residual, w, b, "add"),
            "input's gradient, MKL": lambda: dy @ w,
            "input's gradient, oneDNN": lambda: linear(dy, w.t(), None, "none", [], ""),
            "weight's gradient, MKL": lambda: dy.t() @ x,
            "weight's gradient, oneDNN": lambda: linear(dy.t(), x.t(), None, "none", [], ""),
        },
        repeats,
    )


def attention(shape: tuple[int, int, int, int], repeats: int) -> dict[str, float]:
    """Flash attention with all keys at once against the way we choose, in the dtypes that the
    processor multiplies; and the way we choose from packed q, k and v and with their rotation."""
    calls: dict[str, Callable[[], object]] = {}
    narrow = [torch.bfloat16] if multiplies_bfloat16() else []
    for dtype in (torch.float32, *narrow):
        q, k, v, grad = (torch.randn(shape, dtype=dtype) for _ in range(4))
        out, lse = _flash(q, k, v)
        packed = torch.stack([x.transpose(1, 2) for x in (q, k, v)], 2)
        angle = torch.randn(1, shape[2], shape[3] // 2)
        table = torch.stack([angle.cos(), angle.sin()], -1)
        mixed, above = (x.transpose(1, 2).contiguous() for x in (out, grad))
        rotary_lse = attention_cpu.rotary_forward(packed, table, mixed)
        name = str(dtype).removeprefix("torch.")
        calls |= {
            f"forward, flash, {name}": partial(_flash, q, k, v),
            f"forward, ours, {name}": partial(attention_cpu.forward, q, k, v),
            f"backward, flash, {name}": partial(
                _flash_backward, grad, q, k, v, out, lse, 0.0, False
            ),
            f"backward, ours, {name}": partial(attention_cpu.backward, grad, q, k, v, out, lse),
            f"forward, ours, rotation with it, {name}": partial(
                attention_cpu.rotary_forward, packed, table, mixed
            ),
            f"backward, ours, rotation with it, {name}": partial(
                attention_cpu.rotary_backward, above, packed, table, mixed, rotary_lse,
                torch.empty_like(packed),
            ),
        }  # fmt: skip
    return in_turn(calls, repeats)


def _gelu_backward(h_RF: Tensor, da_RF: Tensor) -> object:
    return passes_cpu.gelu_backward(h_RF, da_RF.clone())


def passes(rows: int, width: int, repeats: int) -> dict[str, float]:
    """GELU of a hidden layer four times as wide, LayerNorm of a float32 stream, and their
    gradients, by PyTorch's operations and the way we choose. GELU's gradient, which gives GELU too
    and overwrites one, comes with a copy of it."""
    able = avx512.refusal

    def by(chosen: bool, call: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            avx512.refusal = able if chosen else lambda *_: "PyTorch's turn"
            call()
            avx512.refusal = able

        return run

    x, residual, weight, bias = (torch.randn(rows, width) for _ in range(4))
    calls: dict[str, Callable[[], object]] = {}
    narrow = [torch.bfloat16] if multiplies_bfloat16() else []
    for dtype in (torch.float32, *narrow):
        h, da = (torch.randn(rows, 4 * width, dtype=dtype) for _ in range(2))
        dn = torch.randn(rows, width, dtype=dtype)
        kinds: dict[str, Callable[[], object]] = {
            "GELU": partial(passes_cpu.gelu, h),
            "GELU's gradient": partial(_gelu_backward, h, da),
            "norm": partial(passes_cpu.layer_norm, x, weight[0], bias[0], 1e-6, dtype),
            "norm's gradient": partial(
                passes_cpu.layer_norm_backward, dn, x, residual, weight[0], bias[0], 1e-6
            ),
        }
        name = str(dtype).removeprefix("torch.")
        for kind, call in kinds.items():
            calls[f"{kind}, PyTorch, {name}"] = by(False, call)
            calls[f"{kind}, ours, {name}"] = by(True, call)
    return in_turn(calls, repeats)


def bfloat16_errors(deviation: float, channels: int) -> dict[str, float]:
    """Relative error of attention in bfloat16 against float64 from unrounded q, k and v, for
    scores of a standard deviation: the output and the mean of the three gradients."""
    shape = (1, 2, 2048, channels)
    leaves = [torch.randn(shape, dtype=torch.float64) for _ in range(3)]
    leaves = [(t * deviation**0.5 if i < 2 else t).requires_grad_() for i, t in enumerate(leaves)]
    grad = torch.randn(shape, dtype=torch.float64)

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = (q @ k.transpose(-1, -2) * channels**-0.5).softmax(-1) @ v
        return out

    exact = formula(*leaves)
    exact_grads = torch.autograd.grad(exact, leaves, grad)
    q, k, v = (t.detach().bfloat16() for t in leaves)
    narrow_grad = grad.bfloat16()
    same = [t.clone().requires_grad_() for t in (q, k, v)]
    plain = formula(*same)
    flash, ours = _flash(q, k, v), attention_cpu.forward(q, k, v)
    found = {
        "formula": (plain, torch.autograd.grad(plain, same, narrow_grad)),
        "flash": (flash[0], _flash_backward(narrow_grad, q, k, v, *flash, 0.0, False)),
        "ours": (ours[0], attention_cpu.backward(narrow_grad, q, k, v, *ours)),
    }

    def error(a: Tensor, b: Tensor) -> float:
        return float(((a.double() - b).norm() / b.norm()).detach())

    errors = {}
    for name, (out, grads) in found.items():
        errors[f"output, {name}"] = error(out, exact)
        errors[f"gradients, {name}"] = statistics.mean(map(error, grads, exact_grads))
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = {f"product {size}": products(*size, args.repeats) for size in PRODUCTS}
    found |= {f"attention {shape}": attention(shape, args.repeats) for shape in SEQUENCES}
    found |= {f"passes {size}": passes(*size, args.repeats) for size in ROWS}
    for title, times in found.items():
        print(title)
        for name, milliseconds in times.items():
            print(f"  {name:46}{milliseconds:10.3f} ms")
    errors = {
        f"scores' deviation {deviation}, {channels} channels": bfloat16_errors(deviation, channels)
        for channels in (32, 64)
        for deviation in (0.1, 1.0, 3.0)
    }
    for title, values in errors.items():
        print(title)
        for name, value in values.items():
            print(f"  {name:36}{value:10.5f}")
    if args.json:
        record = {
            "torch": torch.__version__,
            "vectors": torch.backends.cpu.get_cpu_capability(),
            "threads": args.threads,
            "milliseconds": found,
            "bfloat16_errors": errors,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
