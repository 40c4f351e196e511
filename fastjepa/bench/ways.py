"""The ways a case is computed, by name, and the proof that they agree before any is timed.

`ours`: the op as it chooses by itself; `formula`: the plain one in eager PyTorch; `compiled`: the
same through torch.compile; `official`: the official order of operations.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fastjepa.bench.attention_case import PackedAttention
from fastjepa.bench.case import Case, Forward
from fastjepa.bench.loss_cases import DenseL1, DenseL1Overwriting, LinearDenseL1
from fastjepa.bench.model_cases import EmaUpdate, Rope3d, Rope3dInPlace
from fastjepa.bench.official import Official
from fastjepa.bench.shapes import TINY, expected
from fastjepa.bench.token_cases import AssembleTokens, GatherTokens, MaskDistance

CASES: dict[str, type[Case]] = {
    case.name: case
    for case in (
        DenseL1, DenseL1Overwriting, LinearDenseL1, MaskDistance, Rope3d, Rope3dInPlace,
        GatherTokens, AssembleTokens, PackedAttention, EmaUpdate,
    )
}  # fmt: skip

# Of the largest value, in float32: sums in another order stay far below.
TOLERANCE = 1e-4


def cases_named(names: list[str]) -> list[type[Case]]:
    """Cases by name, all for none. Raises ValueError for an unknown one."""
    for name in names:
        if name not in CASES:
            raise ValueError(f"--op {name}: {expected(name, list(CASES))}")
    return [CASES[name] for name in dict.fromkeys(names)] or list(CASES.values())


def ways(case: Case, official: Official, *, compiled: bool) -> dict[str, Forward]:
    """Forwards by name, on the case's own inputs."""
    found: dict[str, Forward] = {
        "ours": case.ours,
        "formula": lambda: case.formula(*case.arguments()),
        "official": partial(case.official, official),
        **case.others(),
    }
    if compiled:
        found["compiled"] = lambda: _compiled(type(case))(*case.arguments())
    return found


@cache
def _compiled(case: type[Case]) -> Callable[..., list[Tensor]]:
    return torch.compile(case.formula, dynamic=False)


def check_agreement(
    case: type[Case], official: Official, device: torch.device, *, compiled: bool
) -> None:
    """Raises ValueError if a way gives other numbers or gradients than the formula, on a tiny
    float32 shape."""
    exact = _numbers(case, "formula", official, device, compiled)
    for name in ways(case(TINY, device), official, compiled=compiled):
        found = _numbers(case, name, official, device, compiled)
        errors = [_relative(f, e) for f, e in zip(found, exact, strict=True)]
        error = float(torch.stack(errors).max())  # Python's max() passes over a NaN
        if not error <= TOLERANCE:
            raise ValueError(
                f"{case.name}: {name} differs from the formula by {error:.1e} of the largest "
                f"value, more than {TOLERANCE:g}: nothing was timed"
            )


def _numbers(
    case: type[Case], way: str, official: Official, device: torch.device, compiled: bool
) -> list[Tensor]:
    """A way's outputs and the leaves' gradients, on inputs of its own: some ways overwrite them."""
    made = case(TINY, device)
    forward: Any = ways(made, official, compiled=compiled)[way]
    with torch.set_grad_enabled(bool(made.leaves)):
        output = made.comparable(way, forward())
    # Not all ones, so that a gradient in the wrong place shows.
    slope = torch.linspace(0.5, 1.5, output.numel(), device=device, dtype=output.dtype)
    grads = torch.autograd.grad(output, list(made.leaves), slope) if made.leaves else ()
    return [output.detach(), *grads]


def _relative(found: Tensor, exact: Tensor) -> Tensor:
    return (found - exact).abs().max() / exact.abs().max()
