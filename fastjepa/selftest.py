"""Small checks that fastjepa works on this machine: each runs the real code and takes about a
second.

A check returns what it found, in words; an AssertionError says what it found instead of what.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastjepa.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    load_strict,
    pack_optimizer,
    save_checkpoint,
    unpack_optimizer,
)
from fastjepa.masking.batch import MaskMaker
from fastjepa.masking.blocks import Blocks
from fastjepa.model import Encoder, Predictor
from fastjepa.model.block import Block
from fastjepa.model.positions import rotary_table
from fastjepa.model.segments import segments_of
from fastjepa.objective.dense_loss import Objective
from fastjepa.train.engine import TorchEngine, named_parameters
from fastjepa.train.guard import LossGuard
from fastjepa.train.step import Jepa, MicroBatch, train_step
from fastjepa_kernels import (
    assemble_tokens,
    ema_update,
    gather_tokens,
    linear_dense_l1,
    mask_distance,
    packed_rows,
    rope3d,
)
from fastjepa_kernels.dense_l1 import reference as loss_formula
from fastjepa_kernels.ema.reference import ema_update as moving_average
from fastjepa_kernels.mask_distance.reference import mask_distance as every_pair
from fastjepa_kernels.rope3d.reference import rope3d as rotated
from fastjepa_kernels.tokens.reference import assemble_tokens as put_together
from fastjepa_kernels.tokens.reference import gather_tokens as by_index

# Differences in the order of float32 sums stay well below this, relative to the largest value.
TOLERANCE = 1e-4

# What a broken library can raise through ours.
_FAILURES = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)

_FRAMES, _SIDE, _GRID = 4, 64, (2, 4, 4)


def failure(test: Callable[[], str]) -> tuple[bool, str]:
    """Run a self-test: (False, what it found), or (True, why it failed)."""
    try:
        return False, test()
    except AssertionError as error:
        return True, str(error)
    except _FAILURES as error:
        return True, f"{type(error).__name__}: {' '.join(str(error).split())}"


def training_step() -> str:
    """A tiny training step on the CPU: a finite loss, and every weight in use and its EMA move."""
    jepa, _, loss_0, before = _one_step()
    loss = float(loss_0)
    assert np.isfinite(loss), f"the loss is {loss}"
    unused = ("patch_embed_img", "img_mod_embed")  # an image step's
    for part, module in _parts(jepa.encoder, jepa.predictor, jepa.target):
        still = [
            name
            for name, parameter in module.named_parameters()
            if not name.startswith(unused) and torch.equal(parameter, before[part][name])
        ]
        assert not still, f"{part}: {', '.join(still)} did not move"
    return f"loss {loss:.4f}, every weight and its EMA moved"


def block_equals_formula(device: str = "cpu") -> str:
    """The block's fast path against the plain formula: output and gradients."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fast, plain = Block(48, 2, 96), Block(48, 2, 96, attention="math")
        x_RD = torch.randn(2 * 32 + 2 * 16, 48)
    plain.load_state_dict(fast.state_dict())
    segments = segments_of([(2, 32), (2, 16)])
    table = rotary_table(_GRID, 24, like=x_RD).to(device)
    tables = [table[None], table[None, :16]]

    def run(block: Block) -> list[Tensor]:
        x = x_RD.to(device).requires_grad_()
        y = block.to(device)(x, tables, segments)
        y.square().sum().backward()
        grads = (t.grad for t in (x, *block.parameters()))
        return [y.detach(), *(grad for grad in grads if grad is not None)]

    return _same(run(fast), run(plain))


def ops_equal_formulas(device: str = "cpu") -> str:
    """The ops as they run on `device` against their written-out formulas, gradients included."""
    rng = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=rng).to(device)

    order = torch.rand(2, 32, generator=rng).argsort(dim=1).to(device)
    context, predict = order[:, :20].sort().values, order[:, 20:].sort().values
    qkv = normal(32, 3, 2, 24)
    table = rotary_table(_GRID, 24, like=qkv)
    tokens, mask, levels = normal(2, 32, 48), normal(48), [normal(64, 48), normal(64, 48)]
    seen = gather_tokens(tokens, context)
    heads = (normal(24, 48), normal(96, 48).requires_grad_(), normal(96))
    rows = packed_rows([predict], 32), [predict.numel()]
    loss, _ = linear_dense_l1(*heads, levels, *rows)
    wanted, _ = loss_formula.linear_dense_l1(*heads, levels, *rows)
    kept, source = [normal(48, 5), normal(7)], [normal(48, 5), normal(7)]
    moved = [k.clone() for k in kept]
    moving_average(moved, source, 0.9)
    ema_update(kept, source, 0.9)
    return _same(
        [
            mask_distance(context, predict, _GRID), rope3d(qkv, table), seen,
            assemble_tokens(seen, mask, context, predict).tokens, loss.detach(),
            *torch.autograd.grad(loss, heads[1]), *kept,
        ],
        [
            every_pair(context, predict, _GRID).float(), rotated(qkv, table),
            by_index(tokens, context), put_together(seen, mask, context, predict)[0],
            wanted.detach(), *torch.autograd.grad(wanted, heads[1]), *moved,
        ],
    )  # fmt: skip


def frames_identical(open_loader: Callable[..., Any] | None = None) -> str:
    """Videos of every codec that can be encoded here, through the loader: the right frames."""
    from fastjepa.data.encode import encodable
    from fastjepa.data.frame_identity import count_wrong_frames
    from fastjepa.data.loader import Loader
    from fastjepa.data.numbered import write_numbered

    with tempfile.TemporaryDirectory() as folder:
        codecs = enumerate(encodable())
        videos = [write_numbered(Path(folder), number, codec=codec) for number, codec in codecs]
        count = count_wrong_frames(videos, open_loader or Loader, clips=24)
    assert not count.wrong, str(count)
    return str(count)


def frames_identical_by_dali() -> str:
    """The same through DALI, on the GPU if there is one."""
    from fastjepa.data.decode_dali import DaliDecoder
    from fastjepa.data.loader import Loader

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    decoder = DaliDecoder(device, threads=1, normalised=device.type == "cuda")
    return frames_identical(partial(Loader, device_decoder=decoder))


def checkpoint_round_trip() -> str:
    """Weights and AdamW's state of a training step, saved and read back bit for bit."""
    jepa, engine, _, _ = _one_step()
    named = named_parameters(jepa.encoder, jepa.predictor)
    wanted = {
        "encoder": dict(jepa.encoder.state_dict()),
        "optimizer": pack_optimizer(engine.optimizer, named),
    }
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), 1, wanted, {}, keep=1)
        path = latest_checkpoint(Path(folder))
        assert path is not None, "no checkpoint was found after the save"
        # They are read as they are asked for.
        stored = load_checkpoint(path).tensors
        found = {part: dict(tensors) for part, tensors in stored.items()}
    for part, tensors in wanted.items():
        differing = [n for n, tensor in tensors.items() if not torch.equal(tensor, found[part][n])]
        assert not differing, f"{part}: {', '.join(differing)} came back altered"
    load_strict(jepa.encoder, found["encoder"], "encoder")
    unpack_optimizer(engine.optimizer, named, found["optimizer"])
    return f"{sum(len(tensors) for tensors in wanted.values())} tensors bit for bit"


def masks_reproducible() -> str:
    """Masks depend on the seed and the step alone; context and predicted tokens never meet."""
    maker, again = _masks(), _masks()
    for step in (0, 1, 1000):
        one, other = maker(step), again(step)
        for ours, theirs in zip(
            (*one.context, *one.predict), (*other.context, *other.predict), strict=True
        ):
            assert torch.equal(ours, theirs), f"step {step}: two draws of the same masks differ"
        for context, predict in zip(one.context, one.predict, strict=True):
            met = (context[:, :, None] == predict[:, None]).any()
            assert not met, f"step {step}: a token is both context and predicted"
    different = any(
        a.shape != b.shape or not torch.equal(a, b)
        for a, b in zip(maker(0).context, maker(1).context, strict=True)
    )
    assert different, "steps 0 and 1 have the same masks"
    return "the same for one seed and step, others for another step"


SELF_TESTS: dict[str, Callable[[], str]] = {
    "training step": training_step,
    "CPU block": block_equals_formula,
    "ops": ops_equal_formulas,
    "video decoding": frames_identical,
    "checkpoint": checkpoint_round_trip,
    "masks": masks_reproducible,
}


def _masks() -> MaskMaker:
    groups = (
        Blocks(num_blocks=2, spatial_scale=(0.3, 0.3)),
        Blocks(num_blocks=1, spatial_scale=(0.6, 0.6)),
    )
    return MaskMaker(groups, _GRID, batch=2, seed=0)


def _one_step() -> tuple[Jepa, TorchEngine, Tensor, dict[str, dict[str, Tensor]]]:
    """A tiny model after one step, with the loss and the weights from before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"width": 48, "depth": 2, "heads": 2, "mlp_width": 96, "levels": (0, 1)}
        encoder, target = Encoder(**sizes), Encoder(**sizes)  # type: ignore[arg-type]
        predictor = Predictor(
            encoder_width=48, num_levels=2, width=24, depth=1, heads=2, num_mask_tokens=1
        )
        clip = torch.randn(2, 3, _FRAMES, _SIDE, _SIDE)
    target.load_state_dict(encoder.state_dict())
    before = {
        part: {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
        for part, module in _parts(encoder, predictor, target)
    }
    jepa = Jepa(encoder, predictor, target, Objective((0.5, 0.5)), (0, 1), (0, 1))
    engine = TorchEngine(encoder=encoder, predictor=predictor, target=target)
    guard = LossGuard(sigma=None, window=4, start=0, device=torch.device("cpu"))
    batch = MicroBatch(clip, _masks()(0), share=1.0, context_weight=0.5)
    report = train_step(
        jepa, engine, guard, [batch], step=0, lr=1e-2, weight_decay=0.04, momentum=0.9
    )
    return jepa, engine, report.loss, before


def _parts(
    encoder: nn.Module, predictor: nn.Module, target: nn.Module
) -> tuple[tuple[str, nn.Module], ...]:
    return ("encoder", encoder), ("predictor", predictor), ("target", target)


def _same(found: list[Tensor], wanted: list[Tensor]) -> str:
    pairs = zip(found, wanted, strict=True)
    errors = [(a - b).abs().max() / b.abs().max().clamp(min=1e-6) for a, b in pairs]
    error = float(torch.stack(errors).max())  # Python's max() passes over a NaN
    assert error <= TOLERANCE, f"relative error {error:.1e}, expected at most {TOLERANCE:g}"
    return f"relative error {error:.1e}, at most {TOLERANCE:g} allowed"
