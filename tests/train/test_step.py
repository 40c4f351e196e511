"""A whole training step: micro-batches, accumulation, and steps that must leave no trace."""

import copy
import traceback
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastjepa.masking.batch import MaskMaker, Masks
from fastjepa.masking.blocks import Blocks
from fastjepa.model import Encoder, Predictor
from fastjepa.model.block import blocks_of
from fastjepa.objective.dense_loss import Objective
from fastjepa.train.engine import TorchEngine, named_parameters
from fastjepa.train.guard import LossGuard
from fastjepa.train.step import (
    Jepa,
    MicroBatch,
    StepReport,
    forward,
    forward_backward,
    train_step,
)

LEVELS = (0, 1)
CPU = torch.device("cpu")


def make(
    dtype: torch.dtype = torch.float32, device: torch.device = CPU, **engine: object
) -> tuple[Jepa, TorchEngine, LossGuard]:
    torch.manual_seed(0)
    encoder = Encoder(width=16, depth=2, heads=2, mlp_width=24, levels=LEVELS, patch=8)
    predictor = Predictor(
        encoder_width=16, num_levels=2, width=16, depth=2, heads=2, num_mask_tokens=2, patch=8
    )
    target = copy.deepcopy(encoder)
    if dtype == torch.float64:
        for network in (encoder, predictor, target):
            network.double()
    for network in (encoder, predictor, target):
        network.to(device)
    jepa = Jepa(encoder, predictor, target, Objective((0.5, 0.5)), LEVELS, LEVELS)
    made = TorchEngine(
        encoder=encoder, predictor=predictor, target=target, dtype=dtype, **engine  # type: ignore[arg-type]
    )  # fmt: skip
    return jepa, made, LossGuard(sigma=None, window=4, start=0, device=device)


def micro_batch(
    *, image: bool = False, batch: int = 2, step: int = 0, share: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> MicroBatch:  # fmt: skip
    generator = torch.Generator().manual_seed(step)
    clip = torch.randn(batch, 3, 1 if image else 4, 32, 32, generator=generator)
    groups = (Blocks(3, (0.2, 0.2)), Blocks(1, (0.5, 0.5)))[: 1 if image else 2]
    maker = MaskMaker(groups, (1 if image else 2, 4, 4), batch, seed=0)
    return MicroBatch(clip.to(dtype), maker(step), share, context_weight=0.5)


def batch_on(batch: MicroBatch, device: torch.device) -> MicroBatch:
    return replace(batch, clip=batch.clip.to(device), masks=batch.masks.to(device))


def run(
    jepa: Jepa, engine: TorchEngine, guard: LossGuard, *batches: MicroBatch, step: int = 0
) -> StepReport:
    return train_step(
        jepa, engine, guard, batches, step=step, lr=1e-3, weight_decay=0.04, momentum=0.99
    )


def everything(jepa: Jepa, engine: TorchEngine) -> list[Tensor]:
    """Weights, moments and the average, copied."""
    networks = (jepa.encoder, jepa.predictor, jepa.target)
    weights = [p.detach().clone() for network in networks for p in network.parameters()]
    moments = [v.clone() for state in engine.optimizer.state.values() for v in state.values()]
    return weights + moments


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_step_trains_all_that_its_modality_uses(image: bool, dtype: torch.dtype) -> None:
    jepa, engine, guard = make(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    batch = micro_batch(image=image, dtype=wide)
    before = {n: p.detach().clone() for n, p in jepa.encoder.named_parameters()}
    average = {n: p.detach().clone() for n, p in jepa.target.named_parameters()}
    report = run(jepa, engine, guard, batch)
    assert report.loss.isfinite()
    assert report.grad_norm.isfinite()
    assert report.grad_norm > 0
    assert not report.veto
    idle = "patch_embed." if image else "patch_embed_img."
    idle_embedding = "video_mod_embed" if image else "img_mod_embed"
    for name, parameter in jepa.encoder.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == (not name.startswith((idle, idle_embedding))), name
    for name, parameter in jepa.target.named_parameters():
        expected = 0.99 * average[name] + 0.01 * dict(jepa.encoder.named_parameters())[name]
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-8)


class HostReads(TorchDispatchMode):
    """Operations that on a GPU make the host wait: for a value, or for numbers of its own to be
    copied."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "lift_fresh", "nonzero", "_unique2", "equal"):
            places = [f.name for f in traceback.extract_stack() if "fastjepa" in f.filename]
            self.found.append(f"{name} in {' > '.join(places[-3:])}")
        return func(*args, **(kwargs or {}))


def test_the_host_waits_for_no_value_of_a_step() -> None:
    """With the blocks of a GPU: a host that waits in the middle leaves the GPU idle until it has
    caught up (53 ms of ViT-L's 280)."""
    jepa, engine, _ = make(torch.bfloat16, in_turn=False)
    guard = LossGuard(sigma=3.0, window=4, start=0, device=CPU)
    for block in blocks_of(jepa.encoder, jepa.predictor, jepa.target):
        block.by_hand = "gpu"
    batches = micro_batch(), micro_batch(image=True)
    with HostReads() as reads:
        run(jepa, engine, guard, *batches)
    # On a CPU the loss's scale is read, since that is free there.
    assert [read for read in reads.found if not read.endswith("> scaled > _scale")] == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_is_not_waited_for_in_a_step() -> None:
    jepa, engine, _ = make(torch.bfloat16, device=torch.device("cuda"))
    guard = LossGuard(sigma=3.0, window=4, start=0, device=engine.device)
    batches = [batch_on(batch, engine.device) for batch in (micro_batch(), micro_batch(image=True))]
    for step in range(3):  # kernels are compiled, backends measured, and moments made first
        torch.cuda.set_sync_debug_mode("error" if step == 2 else "default")
        try:
            report = run(jepa, engine, guard, *batches, step=step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert report.loss.isfinite()


def test_the_loss_falls_on_one_batch() -> None:
    jepa, engine, guard = make()
    losses = [float(run(jepa, engine, guard, micro_batch(), step=s).loss) for s in range(30)]
    assert losses[-1] < 0.95 * losses[0]


def test_micro_batches_add_up_by_their_shares() -> None:
    """Images and videos in one optimizer step, weighed as the ranks of the reference are."""
    batches = (
        micro_batch(share=0.75, dtype=torch.float64),
        micro_batch(image=True, share=0.25, step=3, dtype=torch.float64),
    )
    grads: list[dict[str, Tensor]] = []
    losses = []
    for batch in batches:
        jepa, engine, _ = make(torch.float64)
        (terms,) = forward(jepa, [batch], torch.float64)
        engine.backward(terms.total)
        losses.append(terms.total.detach())
        named = (*jepa.encoder.named_parameters(), *jepa.predictor.named_parameters("predictor"))
        grads.append({n: p.grad.clone() for n, p in named if p.grad is not None})

    jepa, engine, guard = make(torch.float64)
    seen: dict[str, Tensor] = {}
    original = engine.step

    def spy(**arguments: object) -> None:
        named = (*jepa.encoder.named_parameters(), *jepa.predictor.named_parameters("predictor"))
        seen.update({n: p.grad.clone() for n, p in named if p.grad is not None})
        original(**arguments)  # type: ignore[arg-type]

    engine.step = spy  # type: ignore[method-assign]
    report = run(jepa, engine, guard, *batches)
    assert seen.keys() == grads[0].keys() | grads[1].keys()
    for name, gradient in seen.items():
        expected = sum(
            share * grads[i][name] for i, share in enumerate((0.75, 0.25)) if name in grads[i]
        )
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(report.loss.double(), 0.75 * losses[0] + 0.25 * losses[1])
    assert len(report.terms) == 2


def test_accumulation_equals_one_large_batch() -> None:
    whole = micro_batch(batch=4, dtype=torch.float64)

    def part(rows: slice) -> MicroBatch:
        masks = whole.masks
        assert masks.weights is not None
        cut = Masks(
            tuple(t[rows] for t in masks.context), tuple(t[rows] for t in masks.predict),
            tuple(t[rows] for t in masks.weights),
        )  # fmt: skip
        return MicroBatch(whole.clip[rows], cut, 0.5, whole.context_weight)

    one, two = make(torch.float64), make(torch.float64)
    large = run(*one, whole)
    small = run(*two, part(slice(0, 2)), part(slice(2, 4)))
    torch.testing.assert_close(large.loss, small.loss)
    torch.testing.assert_close(large.grad_norm, small.grad_norm)
    for a, b in zip(everything(*one[:2]), everything(*two[:2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_a_step_is_reproducible_bit_by_bit() -> None:
    one, two = make(), make()
    for number in range(3):
        for made in (one, two):
            run(*made, micro_batch(step=number), step=number)
    assert same(everything(*one[:2]), everything(*two[:2]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_leaves_no_trace(value: float) -> None:
    jepa, engine, guard = make()
    run(jepa, engine, guard, micro_batch())
    before = everything(jepa, engine)
    bad = micro_batch(step=1)
    bad.clip[0, 0, 0, 0, 0] = value
    report = run(jepa, engine, guard, bad, step=1)
    assert report.veto
    assert same(everything(jepa, engine), before)
    assert int(guard.skipped) == int(guard.skipped_in_a_row) == 1
    assert not run(jepa, engine, guard, micro_batch(step=2), step=2).veto
    assert int(guard.skipped_in_a_row) == 0
    assert not same(everything(jepa, engine), before)


def test_an_infinite_gradient_under_a_finite_loss_leaves_no_trace() -> None:
    jepa, engine, guard = make()
    before = everything(jepa, engine)
    original = engine.backward

    def overflow(loss: Tensor) -> None:
        original(loss)
        engine.gradients()[0].view(-1)[0] = torch.inf

    engine.backward = overflow  # type: ignore[method-assign]
    report = run(jepa, engine, guard, micro_batch())
    assert report.loss.isfinite()
    assert report.veto
    # The moments came into being, all zero.
    after = everything(jepa, engine)
    assert same(after[: len(before)], before)
    assert not any(moment.any() for moment in after[len(before) :])


def test_a_loss_that_jumps_is_skipped() -> None:
    jepa, engine, _ = make()
    guard = LossGuard(sigma=3.0, window=4, start=0, device=CPU)
    for number in range(4):
        run(jepa, engine, guard, micro_batch(step=number), step=number)
    before = everything(jepa, engine)
    report = run(jepa, engine, guard, micro_batch(step=4, share=100.0), step=4)
    assert report.veto
    assert same(everything(jepa, engine), before)


def test_without_context_weight_nothing_of_the_context_term_is_trained() -> None:
    jepa, engine, guard = make()
    batch = micro_batch()
    before = jepa.predictor.predictor_proj_context.weight.detach().clone()
    report = run(jepa, engine, guard, MicroBatch(batch.clip, batch.masks, 1.0, 0.0))
    assert report.terms[0].context is None
    assert torch.equal(jepa.predictor.predictor_proj_context.weight, before)


def test_a_wider_frozen_teacher_teaches_its_last_level() -> None:
    torch.manual_seed(0)
    student = Encoder(width=16, depth=2, heads=2, mlp_width=24, levels=LEVELS, patch=8)
    teacher = Encoder(width=24, depth=3, heads=2, mlp_width=24, levels=(0, 2), patch=8)
    predictor = Predictor(
        encoder_width=16, num_levels=1, width=16, depth=1, heads=2, out_width=24, patch=8
    )
    average = copy.deepcopy(student)
    jepa = Jepa(student, predictor, average, Objective((1.0,)), (1,), (2,), teacher)
    engine = TorchEngine(encoder=student, predictor=predictor, target=average)
    before = [p.detach().clone() for p in teacher.parameters()]
    guard = LossGuard(sigma=None, window=4, start=0, device=CPU)
    report = run(jepa, engine, guard, micro_batch())
    assert not report.veto
    assert report.terms[0].predict_terms.shape == (2, 1)
    assert same([p.detach() for p in teacher.parameters()], before)
    assert not any(p.grad is not None for p in teacher.parameters())
    assert not same(list(average.parameters()), list(student.parameters()))


@pytest.mark.parametrize("context_weight", [0.5, 0.0])
@pytest.mark.parametrize(
    ("dtype", "clips"), [(torch.float32, 2), *((torch.float64, clips) for clips in (1, 2, 3))]
)
def test_mask_groups_in_turn_equal_the_packed_pass(
    dtype: torch.dtype, clips: int, context_weight: float
) -> None:
    """Of the second group half of the clips go at a time, however many they are."""
    found = []
    for in_turn in (False, True):
        jepa, engine, _ = make(dtype, in_turn=in_turn)
        batch = micro_batch(share=0.3, batch=clips, dtype=dtype)
        batch = replace(batch, context_weight=context_weight)
        (terms,) = forward_backward(jepa, engine, [batch])
        found.append(
            (terms, {n: p.grad for n, p in named_parameters(jepa.encoder, jepa.predictor)})
        )
    (packed, expected), (turns, ours) = found
    near = (
        {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-7}
    )
    assert torch.allclose(packed.total, turns.total, **near)
    assert torch.allclose(packed.predict_terms, turns.predict_terms, **near)
    assert (packed.context is None) == (turns.context is None)
    if packed.context is not None:
        assert torch.allclose(packed.context, turns.context, **near)
        assert torch.allclose(packed.context_terms, turns.context_terms, **near)
    for name, gradient in expected.items():
        if gradient is None:
            assert ours[name] is None
        else:
            assert torch.allclose(gradient, ours[name], **near), name


@pytest.mark.parametrize(("image", "passes"), [(False, [3, 2, 1]), (True, [3])])
def test_the_first_group_goes_whole_and_the_others_by_halves(
    image: bool, passes: list[int]
) -> None:
    jepa, engine, _ = make(in_turn=True)
    found: list[int] = []
    jepa.predictor.register_forward_hook(
        lambda network, given, rows: found.append(sum(map(len, given[1])))
    )
    forward_backward(jepa, engine, [micro_batch(image=image, batch=3)])
    assert found == passes


def clips_and_masks(
    *, frames: int, crop: int, share: float, truncate: bool = True, context_weight: float = 0.5
) -> MicroBatch:
    generator = torch.Generator().manual_seed(frames)
    clip = torch.randn(2, 3, frames, crop, crop, generator=generator, dtype=torch.float64)
    groups = (Blocks(3, (0.2, 0.2)), Blocks(1, (0.5, 0.5)))[: 1 if frames == 1 else 2]
    grid = (max(1, frames // 2), crop // 8, crop // 8)
    maker = MaskMaker(groups, grid, 2, seed=frames, truncate=truncate)
    return MicroBatch(clip, maker(0), share, context_weight)


def note(passes: list[str], network: nn.Module, *_: object) -> None:
    passes.append(type(network).__name__)


@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize(
    "streams",
    [
        # Clips of two lengths and sizes; beside images; with exact masks.
        [{"frames": 4, "crop": 32, "share": 0.7}, {"frames": 8, "crop": 40, "share": 0.3}],
        [
            {"frames": 4, "crop": 32, "share": 0.5},
            {"frames": 1, "crop": 48, "share": 0.2, "context_weight": 0.0},
            {"frames": 6, "crop": 32, "share": 0.3, "truncate": False},
        ],
    ],
)
def test_micro_batches_packed_into_one_sequence_equal_one_after_the_other(
    streams: list[dict[str, Any]], by_hand: bool
) -> None:
    batches = [clips_and_masks(**stream) for stream in streams]
    found = []
    for packed in (False, True):
        jepa, engine, guard = make(torch.float64, in_turn=False)
        if not by_hand:
            for block in blocks_of(jepa.encoder, jepa.predictor, jepa.target):
                block.by_hand = None
        passes: list[str] = []
        for network in (jepa.encoder, jepa.predictor, jepa.target):
            network.register_forward_hook(partial(note, passes))
        report = train_step(
            jepa, engine, guard, batches, step=0, lr=1e-3, weight_decay=0.04, momentum=0.99,
            norms_by_part=True, packed=packed,
        )  # fmt: skip
        assert len(passes) == (3 if packed else 3 * len(batches))
        found.append((report, everything(jepa, engine)))
    (alone, one), (together, other) = found
    near = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(together.loss, alone.loss)
    torch.testing.assert_close(together.grad_norms, alone.grad_norms, **near)
    for mine, theirs in zip(together.terms, alone.terms, strict=True):
        torch.testing.assert_close(mine.predict_terms, theirs.predict_terms, **near)
        assert (mine.context_terms is None) == (theirs.context_terms is None)
        if mine.context_terms is not None:
            torch.testing.assert_close(mine.context_terms, theirs.context_terms, **near)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("in_turn", [False, True])
def test_exact_masks_equal_a_pass_of_each_clip_by_itself(in_turn: bool) -> None:
    """Losses, terms by level and gradients: every clip weighs the same, whatever it keeps."""
    generator = torch.Generator().manual_seed(0)
    clip = torch.randn(3, 3, 4, 32, 32, generator=generator, dtype=torch.float64)
    groups = (Blocks(3, (0.2, 0.2)), Blocks(2, (0.4, 0.4)))
    masks = MaskMaker(groups, (2, 4, 4), 3, seed=0, truncate=False)(5)
    assert masks.weights is not None
    assert masks.clips is not None
    assert len({index.shape[1] for index in masks.context}) > 2
    jepa, engine, _ = make(torch.float64, in_turn=in_turn)
    (together,) = forward_backward(jepa, engine, [MicroBatch(clip, masks, 0.3, 0.5)])
    ours = {n: p.grad for n, p in named_parameters(jepa.encoder, jepa.predictor)}

    jepa, engine, _ = make(torch.float64, in_turn=in_turn)
    alone = []
    for one in range(3):
        own = [number for number, of in enumerate(masks.clips) if of == one]
        context, predict, weights = (
            tuple(sets[number] for number in own)
            for sets in (masks.context, masks.predict, masks.weights)
        )
        batch = MicroBatch(clip[one : one + 1], Masks(context, predict, weights), 0.1, 0.5)
        alone += forward_backward(jepa, engine, [batch])
    mean = torch.stack([terms.total for terms in alone]).mean()
    assert torch.allclose(together.total, mean, rtol=1e-12, atol=0)
    by_level = torch.stack([terms.predict_terms.mean(0) for terms in alone]).mean(0)
    assert torch.allclose(together.predict_terms.mean(0), by_level, rtol=1e-12, atol=0)
    for name, parameter in named_parameters(jepa.encoder, jepa.predictor):
        if parameter.grad is None:
            assert ours[name] is None
        else:
            assert torch.allclose(ours[name], parameter.grad, rtol=1e-9, atol=1e-14), name
