"""Features of many clips and images through one encoder, batched by shape.

The encoder is a callable, so a training run's, an exported and a foreign one work alike.
Shapes: B clips, T frames, H and W pixels; T', H', W' grid, D channels.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

Levels = Sequence[int]
Name = TypeVar("Name", bound=Hashable)


class Encode(Protocol):
    """Normalised clips float `[B, 3, T, H, W]` to one `[B, T', H', W', D]` for each level asked
    for."""

    def __call__(self, clip_B3THW: Tensor, levels: Levels, /) -> Sequence[Tensor]: ...


def extract(
    encode: Encode,
    inputs: Iterable[tuple[Name, Tensor]],
    levels: Levels,
    *,
    batch: int = 8,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Name, dict[int, Tensor]]]:
    """Yield each input's name and its features by level, `[T', H', W', D]` on the CPU.

    `inputs` are names and normalised float clips `[3, T, H, W]` (an image has T = 1) of any mix
    of shapes. Those of one shape go through the encoder together, up to `batch` at once, so names
    can come back in another order; at most four batches wait. A batch's features never depend on
    `batch` beyond rounding. Raises ValueError naming the input that is no such clip, or what the
    encoder returned that does not fit.
    """
    if batch < 1 or not levels:
        raise ValueError(f"extract: expected batch >= 1 and some levels, got {batch} and {levels}")
    waiting: dict[tuple[int, ...], list[tuple[Name, Tensor]]] = {}
    for name, clip_3THW in inputs:
        if clip_3THW.ndim != 4 or clip_3THW.shape[0] != 3 or not clip_3THW.is_floating_point():
            raise ValueError(
                f"{name}: expected a float clip [3, T, H, W], found {clip_3THW.dtype} "
                f"{tuple(clip_3THW.shape)}"
            )
        shape = tuple(clip_3THW.shape)
        waiting.setdefault(shape, []).append((name, clip_3THW))
        if len(waiting[shape]) == batch:
            yield from _run(encode, waiting.pop(shape), levels, device)
        elif sum(map(len, waiting.values())) >= 4 * batch:
            fullest = max(waiting, key=lambda key: len(waiting[key]))
            yield from _run(encode, waiting.pop(fullest), levels, device)
    for group in waiting.values():
        yield from _run(encode, group, levels, device)


def _run(
    encode: Encode,
    group: list[tuple[Name, Tensor]],
    levels: Levels,
    device: torch.device | str,
) -> Iterator[tuple[Name, dict[int, Tensor]]]:
    with torch.inference_mode():
        outputs = encode(torch.stack([clip for _, clip in group]).to(device), levels)
        if len(outputs) != len(levels) or any(
            o.ndim != 5 or o.shape[0] != len(group) for o in outputs
        ):
            raise ValueError(
                f"encoder: expected {len(levels)} outputs [{len(group)}, T', H', W', D], found "
                f"{[tuple(o.shape) for o in outputs]}"
            )
        on_cpu = [o.cpu() for o in outputs]
    for index, (name, _) in enumerate(group):
        # A copy, so that keeping one clip's features does not keep the batch's.
        yield name, {level: o[index].clone() for level, o in zip(levels, on_cpu, strict=True)}
