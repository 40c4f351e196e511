"""A small training problem that a rank, or one process for all ranks, can work on: the same clips
and masks wherever they are made."""

from dataclasses import replace

import torch
from torch import Tensor

from fastjepa.masking.batch import MaskMaker
from fastjepa.masking.blocks import Blocks
from fastjepa.model import Encoder, Predictor
from fastjepa.model.block import blocks_of
from fastjepa.objective.dense_loss import Objective
from fastjepa.train.engine import Engine, TorchEngine
from fastjepa.train.guard import LossGuard
from fastjepa.train.step import Jepa, MicroBatch, train_step

LEVELS = (1, 3)
CPU = torch.device("cpu")
GROUPS = (Blocks(3, (0.2, 0.2)), Blocks(1, (0.5, 0.5)))


def networks(seed: int = 0, *, checkpointing: bool = False, by_hand: str = "auto") -> Jepa:
    """Freshly initialised, the target a copy of the encoder. `by_hand`: the way of the blocks."""
    torch.manual_seed(seed)
    sizes = {"width": 24, "depth": 4, "heads": 2, "mlp_width": 40, "levels": LEVELS, "patch": 8}
    encoder = Encoder(**sizes, checkpointing=checkpointing)  # type: ignore[arg-type]
    target = Encoder(**sizes)  # type: ignore[arg-type]
    target.load_state_dict(encoder.state_dict())
    predictor = Predictor(
        encoder_width=24, num_levels=2, width=24, depth=2, heads=2, num_mask_tokens=2, patch=8,
        checkpointing=checkpointing,
    )  # fmt: skip
    for block in blocks_of(encoder, target, predictor):
        block.by_hand = by_hand
    return Jepa(encoder, predictor, target, Objective((0.5, 0.5)), LEVELS, LEVELS)


def micro_batch(step: int, rank: int, part: int, *, image: bool, share: float) -> MicroBatch:
    """The clips of one rank; `part` counts the micro-batches of a step."""
    generator = torch.Generator().manual_seed(step * 1000 + rank * 10 + part)
    clip = torch.randn(2, 3, 1 if image else 4, 32, 32, generator=generator)
    grid = (1 if image else 2, 4, 4)
    maker = MaskMaker(GROUPS[: 1 if image else 2], grid, 2, seed=part, rank=rank)
    return MicroBatch(clip, maker(step), share, context_weight=0.5, last=False)


def micro_batches(step: int, ranks: range, *, num: int = 1, share: float = 1.0) -> list[MicroBatch]:
    """A step's micro-batches of some ranks: `num` of videos, or with more than one also images."""
    made = [
        micro_batch(step, rank, part, image=part % 2 == 1, share=share / num)
        for rank in ranks
        for part in range(num)
    ]
    return [*made[:-1], replace(made[-1], last=True)]


def guard(sigma: float | None = None) -> LossGuard:
    return LossGuard(sigma=sigma, window=4, start=0, device=CPU)


def train(
    jepa: Jepa, engine: Engine, *, ranks: int, steps: range, num: int = 1, momentum: float = 0.9,
    watch: LossGuard | None = None, spoilt: tuple[int, ...] = (), packed: bool = False,
) -> tuple[list[float], list[float], list[float]]:  # fmt: skip
    """Losses, gradient norms and vetoes of steps on this engine's share of `ranks` ranks' data.

    In the `spoilt` steps the last rank's clip holds an infinity.
    """
    watch = watch or guard()
    alone = engine.ranks.size == 1
    own = range(ranks) if alone else range(engine.ranks.rank, engine.ranks.rank + 1)
    losses, norms, vetoes = [], [], []
    for step in steps:
        batches = micro_batches(step, own, num=num, share=1 / ranks if alone else 1.0)
        if step in spoilt and own[-1] == ranks - 1:
            batches[-1].clip[0, 0, 0, 0, 0] = torch.inf
        report = train_step(
            jepa, engine, watch, batches, step=step, lr=1e-3, weight_decay=0.1, momentum=momentum,
            packed=packed,
        )  # fmt: skip
        losses.append(float(report.loss))
        norms.append(float(report.grad_norm))
        vetoes.append(float(report.veto))
    return losses, norms, vetoes


def alone(jepa: Jepa, *, dtype: torch.dtype = torch.float32, clip: float | None = None) -> Engine:
    """One process, as every other engine is compared with."""
    return TorchEngine(
        encoder=jepa.encoder, predictor=jepa.predictor, target=jepa.target, dtype=dtype, clip=clip,
        weight_decay=0.1,
    )  # fmt: skip


def state(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """A checkpoint's parts, put together on every rank from all ranks' pieces."""
    whole: dict[str, dict[str, Tensor]] = {}
    for shares in engine.ranks.gather(engine.snapshot()):
        for part, pieces in shares.items():
            tensors = whole.setdefault(part, {})
            for name, piece in pieces.items():
                nothing = torch.full(piece.shape, torch.nan, dtype=piece.data.dtype)
                to = tensors.setdefault(name, nothing).view(-1)
                to[piece.start : piece.start + piece.data.numel()] = piece.data.view(-1)
    return whole
