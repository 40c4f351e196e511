"""The official way: the functions of an official V-JEPA 2 checkout, or their steps restated.

    official = from_checkout(Path("vjepa2"))  # their own functions
    official = RESTATED                       # the same order of operations in our words

Nothing of the checkout is copied.

Shapes: B batch, N grid tokens, K kept tokens, H heads, C channels of an axis.
"""

import importlib
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastjepa.bench.checkout import make_importable
from fastjepa_kernels.mask_distance.reference import positions

_MODELS = "app.vjepa_2_1.models"


@dataclass(frozen=True)
class Official:
    """The functions an official training step is made of; `source` says whose they are.

    gather: tokens [B, N, D] and a list of indices [B, K] to a list of [B, K, D]. mask_distance:
    predicted and context indices of each group and the grid's side to the roots of the distances,
    [B, K] each. rotate: x [B, H, N, C] and positions, [N] or [B, H, N], to x turned.
    """

    source: str
    gather: Callable[[Tensor, Sequence[Tensor]], list[Tensor]]
    mask_distance: Callable[[Sequence[Tensor], Sequence[Tensor], int], list[Tensor]]
    rotate: Callable[[Tensor, Tensor], Tensor]


def from_checkout(path: Path) -> Official:
    """Their own functions. Raises ValueError if `path` is no official checkout with V-JEPA 2.1."""
    make_importable(path)
    apply_masks = importlib.import_module("src.masks.utils").apply_masks
    distance = importlib.import_module(f"{_MODELS}.utils.masks_dist").compute_mask_distance
    turn = importlib.import_module(f"{_MODELS}.utils.modules").rotate_queries_or_keys

    def gather(x_BND: Tensor, groups_BK: Sequence[Tensor]) -> list[Tensor]:
        return list(apply_masks(x_BND, list(groups_BK), concat=False))

    def mask_distance(
        predict_BK: Sequence[Tensor], context_BK: Sequence[Tensor], side: int
    ) -> list[Tensor]:
        return list(distance([list(predict_BK)], [list(context_BK)], side, False)[0])

    def rotate(x: Tensor, place: Tensor) -> Tensor:
        turned: Tensor = turn(x, pos=place, n_registers=0, has_cls_first=False)
        return turned

    return Official(f"checkout {commit_of(path)}", gather, mask_distance, rotate)


def _gather(x_BND: Tensor, groups_BK: Sequence[Tensor]) -> list[Tensor]:
    """Each group by an int64 index as large as what it picks."""
    return [x_BND.gather(1, index[..., None].repeat(1, 1, x_BND.shape[-1])) for index in groups_BK]


def _mask_distance(
    predict_BK: Sequence[Tensor], context_BK: Sequence[Tensor], side: int
) -> list[Tensor]:
    """Context tokens one after another, each against all predicted ones."""
    roots = []
    for predict, context in zip(predict_BK, context_BK, strict=True):
        predict_BK3, context_BK3 = (
            torch.stack(places(i, side, side), -1) for i in (predict, context)
        )
        columns = []
        for place_B3 in context_BK3.unbind(1):
            distance_B1K = torch.cdist(place_B3[:, None], predict_BK3)
            columns.append(distance_B1K.min(-1).values ** 0.5)
        roots.append(torch.cat(columns, dim=1))
    return roots


def _rotate(x: Tensor, place: Tensor) -> Tensor:
    """Angles made anew, frequencies twice in a row, then x cos + rot(x) sin in separate passes."""
    pairs = x.shape[-1] // 2
    frequency = 10_000 ** -(torch.arange(pairs, dtype=x.dtype, device=x.device) / pairs)
    angle = (place[..., None] * frequency).to(x.dtype)
    cos, sin = (wave.repeat_interleave(2, dim=-1) for wave in (angle.cos(), angle.sin()))
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack((-odd, even), -1).flatten(-2) * sin


RESTATED = Official("restated", _gather, _mask_distance, _rotate)


def places(index: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token indices to float positions in time, height and width."""
    frame, row, column = positions(index, (0, height, width)).float().unbind(-1)
    return frame, row, column


def commit_of(path: Path) -> str:
    """Of a checkout, in words where it is not known."""
    if shutil.which("git") is None:
        return "of unknown commit"
    done = subprocess.run(
        ["git", "-C", str(path), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    return done.stdout.strip() or "of unknown commit"
