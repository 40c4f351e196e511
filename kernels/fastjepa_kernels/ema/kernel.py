"""`t + (1 - m) (s - t)` for all tensors of a network, one launch however many there are.

Tensors are cut into chunks of BLOCK elements and one program takes a chunk. A table on the device
tells it where: four int64 per chunk, the addresses of target, source and copy and the number of
elements. The table follows from the tensors' addresses, sizes and dtypes alone, so it is
kept under just these (`_launches`): tensors that moved make another table, and one that is found
again is right, whoever owns the memory now. (So a CUDA graph may capture any call but the first.)

Bytes: 12 an element with float32 sources (read 2, write 1) or 10 with half-precision ones, 2 more
for the copy, plus 32 a chunk. The check for infinities and NaN is a launch of its own that reads
the sources once, as no element may change before all have been seen.

Grid: chunks. 256 threads hold 16 elements of each tensor in registers, eight loads of 16 bytes in
flight a thread; waiting for the row of the table is hidden behind the other programs of the SM.
Only whole chunks of aligned tensors can load 16 bytes at once: a mask or an odd address needs
single elements, so those take another branch, or another launch. Launches: one for each
combination of source dtype, copy dtype and alignment, which is one for most networks.

Deterministic: each element has one owner; the flags are written by stores of the same value.
Precision: the lerp form stays put where source equals target, and 1 - m is taken in float64. Up
to m = 0.5 it starts from the source, which m = 0 then gives exactly.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ahead_of_time import Case

BLOCK, NUM_WARPS = 4096, 8
ALIGNMENT = 16
NAMES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _address(entry_ptr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(entry_ptr).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _mix(target_ptr, source_ptr, copy_ptr, place, inside, momentum, share):
    target = tl.load(target_ptr + place, mask=inside)
    source = tl.load(source_ptr + place, mask=inside).to(tl.float32)
    step = source - target
    mixed = tl.where(share < 0.5, target + share * step, source - momentum * step)
    mixed = tl.where(share == 0.0, target, mixed)
    tl.store(target_ptr + place, mixed, mask=inside)
    if copy_ptr is not None:
        tl.store(copy_ptr + place, mixed.to(copy_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _update(
    table_ptr, momentum, share, scheduled_ptr, veto_ptr, vetoed_ptr,
    SOURCE: tl.constexpr, COPY: tl.constexpr, ALIGNED: tl.constexpr, CHECKED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    stop = tl.full((), 0, tl.int1)
    if veto_ptr is not None:
        stop = stop | (tl.load(veto_ptr) != 0)
    if CHECKED:
        stop = stop | (tl.load(vetoed_ptr) != 0)
    # Programs that read the flag after this store find what they would have concluded anyway.
    if tl.program_id(0) == 0:
        tl.store(vetoed_ptr, stop.to(tl.int32))
    if stop:
        return
    if scheduled_ptr is not None:
        exact = tl.load(scheduled_ptr).to(tl.float64)
        momentum = exact.to(tl.float32)
        share = (1.0 - exact).to(tl.float32)
    row_ptr = table_ptr + tl.program_id(0).to(tl.int64) * 4
    target_ptr = _address(row_ptr, tl.float32, ALIGNED)
    source_ptr = _address(row_ptr + 1, SOURCE, ALIGNED)
    copy_ptr = None
    if COPY is not None:
        copy_ptr = _address(row_ptr + 2, COPY, ALIGNED)
    count = tl.load(row_ptr + 3)
    place = tl.arange(0, BLOCK)
    if count == BLOCK:
        _mix(target_ptr, source_ptr, copy_ptr, place, None, momentum, share)
    else:
        _mix(target_ptr, source_ptr, copy_ptr, place, place < count, momentum, share)


@triton.jit
def _find_nonfinite(
    table_ptr, vetoed_ptr, SOURCE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    row_ptr = table_ptr + tl.program_id(0).to(tl.int64) * 4
    source_ptr = _address(row_ptr + 1, SOURCE, ALIGNED)
    count = tl.load(row_ptr + 3)
    place = tl.arange(0, BLOCK)
    if count == BLOCK:
        source = tl.load(source_ptr + place).to(tl.float32)
    else:
        source = tl.load(source_ptr + place, mask=place < count, other=0.0).to(tl.float32)
    # False for infinities and NaN alike.
    finite = tl.abs(source) < float("inf")
    if tl.min(finite.to(tl.int32), axis=0) == 0:
        tl.store(vetoed_ptr, 1)


class _Row(NamedTuple):
    """One tensor as the table needs it; addresses in bytes."""

    target: int
    source: int
    copy: int
    size: int
    kinds: tuple[torch.dtype, torch.dtype | None]

    @property
    def aligned(self) -> bool:
        return (self.target | self.source | self.copy) % ALIGNMENT == 0


@dataclass(frozen=True)
class _Launch:
    """A table and the kernel's constants that fit all its rows."""

    table: Tensor
    constants: dict[str, object]


@lru_cache(maxsize=16)
def _launches(rows: tuple[_Row, ...], device: torch.device) -> tuple[_Launch, ...]:
    alike = defaultdict(list)
    for row in rows:
        alike[row.kinds, row.aligned].append((row.target, row.source, row.copy, row.size))
    return tuple(
        _Launch(
            _table(torch.tensor(group), *kinds).to(device),
            {
                "SOURCE": NAMES[kinds[0]],
                "COPY": None if kinds[1] is None else NAMES[kinds[1]],
                "ALIGNED": aligned,
            },
        )
        for (kinds, aligned), group in alike.items()
    )


def _table(group: Tensor, source: torch.dtype, copy: torch.dtype | None) -> Tensor:
    """[tensors, 4] addresses and counts to those of each chunk, [chunks, 4] int64."""
    count = group[:, 3]
    chunks = (count + BLOCK - 1) // BLOCK
    before = chunks.cumsum(0) - chunks
    place = torch.arange(int(chunks.sum())) - before.repeat_interleave(chunks)
    table = group.repeat_interleave(chunks, dim=0)
    bytes_each = torch.tensor([4, source.itemsize, 0 if copy is None else copy.itemsize, -1])
    table += (place * BLOCK)[:, None] * bytes_each
    table[:, 3].clamp_(max=BLOCK)
    return table


def ema_update(
    targets: list[Tensor],
    sources: list[Tensor],
    copies: list[Tensor],
    momentum: float,
    scheduled: Tensor | None,
    veto: Tensor | None,
    veto_nonfinite: bool,
) -> Tensor:
    device = targets[0].device
    written: Sequence[Tensor | None] = copies or [None] * len(targets)
    rows = tuple(
        _Row(
            target.data_ptr(),
            source.data_ptr(),
            0 if copy is None else copy.data_ptr(),
            target.numel(),
            (source.dtype, None if copy is None else copy.dtype),
        )
        for target, source, copy in zip(targets, sources, written, strict=True)
        if target.numel()
    )
    vetoed = torch.zeros((), dtype=torch.int32, device=device)
    launches = _launches(rows, device)
    if veto is not None and not launches:
        vetoed.copy_(veto.reshape(()) != 0)
    if veto_nonfinite:
        for launch in launches:
            constants = {k: v for k, v in launch.constants.items() if k != "COPY"}
            _find_nonfinite[(len(launch.table),)](
                launch.table, vetoed, **constants, BLOCK=BLOCK, num_warps=NUM_WARPS
            )
    for launch in launches:
        _update[(len(launch.table),)](
            launch.table, momentum, 1.0 - momentum, scheduled, veto, vetoed, **launch.constants,
            CHECKED=veto_nonfinite, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
    return vetoed


def _cases() -> Iterator[Case]:
    kinds = (
        ("fp32", tl.float32, None),
        ("fp32 copy bf16", tl.float32, tl.bfloat16),
        ("fp32 copy fp16", tl.float32, tl.float16),
        ("bf16 copy bf16", tl.bfloat16, tl.bfloat16),
    )
    update = {
        "table_ptr": "*i64", "momentum": "fp32", "share": "fp32", "scheduled_ptr": "*fp64",
        "veto_ptr": "*fp32", "vetoed_ptr": "*i32",
    }  # fmt: skip
    check = {name: update[name] for name in ("table_ptr", "vetoed_ptr")}
    for aligned, where in ((True, ""), (False, " odd addresses")):
        for name, source, copy in kinds:
            constants = {
                "SOURCE": source, "COPY": copy, "ALIGNED": aligned, "CHECKED": True, "BLOCK": BLOCK,
            }  # fmt: skip
            yield Case(f"update {name}{where}", _update, update, constants, NUM_WARPS)
        for name, source in (("fp32", tl.float32), ("bf16", tl.bfloat16)):
            constants = {"SOURCE": source, "ALIGNED": aligned, "BLOCK": BLOCK}
            yield Case(
                f"find nonfinite {name}{where}", _find_nonfinite, check, constants, NUM_WARPS
            )


AHEAD_OF_TIME = list(_cases())
