"""One recorded training step of the official code, run again by ours and compared tensor by tensor.

A golden file (safetensors; tests/golden/README.md lists its tensors) holds the weights, the clip
and the masks of a step, and everything that comes out of it. `check` builds the networks from the
file, runs `train.step.forward` and the engine on them, and compares every tensor of the file:

    report = check("tests/golden/video.safetensors")
    print("\\n".join(report.lines()), report.passed)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import inf
from pathlib import Path

import torch
from torch import Tensor, nn

from fastjepa.golden import GoldenStep, micro_batch, networks, read_golden
from fastjepa.parity_report import Ledger, Report
from fastjepa.train.engine import TorchEngine, named_parameters
from fastjepa.train.step import Jepa, MicroBatch, forward
from fastjepa_kernels import dense_l1
from fastjepa_kernels.packing import by_group

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}

# The update that golden files record.
LR, WEIGHT_DECAY, MOMENTUM = 1e-3, 0.04, 0.99925


def check(
    path: str | Path,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    attention: str = "auto",
    tolerance: float = 1e-5,
) -> Report:
    """Run the step recorded in `path` with our code and compare every tensor of the file.

    dtype: float32, float64, or bfloat16 (autocast; needs a tolerance of its own). attention: a
    backend of model/attention.py. An error is max|ours - recorded| / max|recorded| over a tensor,
    infinite where either is not finite; max|ours| where all of the recorded tensor is 0. Raises
    ValueError, in one line, for a file that is not such a step, and for options that do not exist.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if not 0.0 < tolerance < inf:
        raise ValueError(f"tolerance: expected a positive number, got {tolerance}")
    golden = read_golden(Path(path), _device(device), DTYPES[dtype])
    jepa = networks(golden, attention)
    batch = micro_batch(golden, jepa.encoder)
    engine = TorchEngine(
        encoder=jepa.encoder, predictor=jepa.predictor, target=jepa.target,
        dtype=DTYPES[dtype], weight_decay=WEIGHT_DECAY,
    )  # fmt: skip
    ledger = Ledger(golden)
    _inputs(jepa, batch, ledger)
    ties = _forward_and_backward(jepa, batch, engine, ledger, tolerance)
    _gradients(jepa, ledger)
    _update(jepa, engine, ledger)
    return ledger.report(tolerance, unused=_unused(jepa, batch), ties=ties)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        float(torch.zeros((), device=device))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: {name!r} cannot be used here: {reason}") from error
    return device


def _parts(jepa: Jepa) -> dict[str, nn.Module]:
    return {"encoder": jepa.encoder, "target": jepa.source, "predictor": jepa.predictor}


def _inputs(jepa: Jepa, batch: MicroBatch, ledger: Ledger) -> None:
    """Inputs are compared through all that comes out of them; here only that they are finite."""
    names = ["clip"]
    for group in range(len(batch.masks.context)):
        names += [f"context_index.{group}", f"predict_index.{group}"]
    for part, network in _parts(jepa).items():
        names += [f"{part}.{name}" for name, _ in network.named_parameters()]
    for name in names:
        ledger.note("inputs", name, fits=bool(ledger.golden[name].isfinite().all()))


@contextmanager
def _outputs(jepa: Jepa) -> Iterator[dict[str, list[Tensor]]]:
    """What each network returns while a step runs, by the network's name."""
    seen: dict[str, list[Tensor]] = {}

    def keep(part: str, outputs: Sequence[Tensor]) -> None:
        seen[part] = list(outputs)

    handles = [
        network.register_forward_hook(
            lambda _module, _inputs, outputs, part=part: keep(part, outputs)
        )
        for part, network in _parts(jepa).items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _forward_and_backward(
    jepa: Jepa, batch: MicroBatch, engine: TorchEngine, ledger: Ledger, tolerance: float
) -> int:
    """Compare all that a forward yields, then leave its gradients; returns the number of ties."""
    masks = batch.masks

    def context_loss(weights: tuple[Tensor, ...] | None) -> Tensor | None:
        whole = replace(batch, masks=replace(masks, weights=weights), context_weight=1.0)
        return forward(jepa, [whole], engine.dtype)[0].context

    with engine.autocast():
        with _outputs(jepa) as seen:
            (terms,) = forward(jepa, [batch], engine.dtype)
        predicted, context = (rows.to(engine.dtype) for rows in seen["predictor"])
        z_predict = by_group(jepa.predictor.predictor_proj(predicted), masks.predict)
        z_context = by_group(jepa.predictor.predictor_proj_context(context), masks.context)
        with torch.no_grad():
            losses = {"loss_context": context_loss(masks.weights)}
            losses["loss_context_unweighted"] = context_loss(None)
            inference = jepa.encoder.features(batch.clip).flatten(1, 3)

    whole = (len(batch.clip), -1)
    ledger.compare("targets", "target_features", torch.cat(seen["target"], -1).unflatten(0, whole))
    targets_BNE = _normalised(seen["target"]).unflatten(0, whole)
    ledger.compare("targets", "targets_normalised", targets_BNE)
    features = by_group(torch.cat(seen["encoder"], -1), masks.context)
    for family, key, groups in (
        ("context features", "context_features", features),
        ("predictions", "z_pred", z_predict),
        ("predictions", "z_context", z_context),
        ("distance weights", "distance_sqrt", [w.reciprocal() for w in masks.weights or ()]),
    ):
        for number, group in enumerate(groups):
            ledger.compare(family, f"{key}.{number}", group)
    for name, loss in {"loss_pred": terms.predict, **losses, "loss": terms.total}.items():
        assert loss is not None, "a context weight of 1 keeps the context term"
        ledger.compare(name, name, loss)
    ledger.compare("inference features", "inference_features", inference)

    settled, ties = _settled(ledger.golden, batch, z_predict, z_context, targets_BNE, tolerance)
    engine.backward(terms.total + settled)
    return ties


def _settled(
    golden: GoldenStep,
    batch: MicroBatch,
    z_predict: Sequence[Tensor],
    z_context: Sequence[Tensor],
    targets_BNE: Tensor,
    tolerance: float,
) -> tuple[Tensor, int]:
    """A summand for the loss that gives ties the recorded sign, and their number.

    Where prediction and target differ by less than the tolerance, the sign of the difference is
    rounding, yet L1 hands it to the gradient in full.
    """
    masks, recorded_BNE = batch.masks, golden["targets_normalised"]
    near = tolerance * float(recorded_BNE.abs().max())
    summand, ties = targets_BNE.new_zeros(()), 0
    for key, z_groups, index_groups, weights in (
        ("z_pred", z_predict, masks.predict, None),
        ("z_context", z_context, masks.context, masks.weights),
    ):
        for g, (z_BKE, index_BK) in enumerate(zip(z_groups, index_groups, strict=True)):
            rows = index_BK[..., None]
            ours = z_BKE.detach() - targets_BNE.take_along_dim(rows, 1)
            recorded = golden[f"{key}.{g}"].view_as(ours) - recorded_BNE.take_along_dim(rows, 1)
            tie = (ours.abs() <= near) & (ours.sign() != recorded.sign())
            slope = torch.where(tie, recorded.sign() - ours.sign(), 0.0)
            slope = slope / (ours.numel() * len(z_groups))
            if weights is not None:
                slope = slope * weights[g][..., None] * batch.context_weight
            summand, ties = summand + (slope * z_BKE).sum(), ties + int(tie.sum())
    return summand, ties


def _normalised(targets_MD: Sequence[Tensor]) -> Tensor:
    """The targets as the loss normalises them, [M, L*D].

    It never shows them: they are the gradient of its squared form at a prediction of 0.
    """
    rows = len(targets_MD[0])
    zero = torch.zeros_like(torch.cat(tuple(targets_MD), -1)).requires_grad_()
    row_R = torch.arange(rows, device=zero.device)
    loss, _ = dense_l1(zero, targets_MD, row_R, [rows], exponent=2.0)
    (gradient,) = torch.autograd.grad(loss, zero)
    return -gradient * zero.numel()


def _gradients(jepa: Jepa, ledger: Ledger) -> None:
    """A gradient may be missing on one side only where the other one is all 0."""
    for name, parameter in named_parameters(jepa.encoder, jepa.predictor):
        key, ours = f"grad.{name}", parameter.grad
        recorded = ledger.golden.tensors.get(key)
        if ours is not None and recorded is not None:
            ledger.compare("gradients", key, ours)
            continue
        for alone in (ours, recorded):
            if alone is not None:
                ledger.note("gradients", key, fits=not alone.any())


def _update(jepa: Jepa, engine: TorchEngine, ledger: Ledger) -> None:
    """AdamW and the EMA, from the recorded gradients.

    The first step of AdamW divides a gradient by its own size: from our gradients, the rounding of
    a sum that should be 0 could become a whole step.
    """
    golden = ledger.golden
    for name, parameter in named_parameters(jepa.encoder, jepa.predictor):
        parameter.grad = golden.tensors.get(f"grad.{name}")
    engine.step(
        lr=LR, weight_decay=WEIGHT_DECAY, momentum=MOMENTUM,
        veto=torch.zeros((), device=engine.device),
    )  # fmt: skip
    results = {
        f"after_adamw.{name}": ("AdamW", parameter)
        for name, parameter in named_parameters(jepa.encoder, jepa.predictor)
    }
    if not golden.distilled:
        for name, parameter in jepa.target.named_parameters():
            results[f"after_ema.target.{name}"] = ("EMA", parameter)
    recorded = [name for name in results if name in golden.tensors]
    for kind in ("after_adamw.", "after_ema.")[: 1 if golden.distilled else 2]:
        if not any(name.startswith(kind) for name in recorded):
            raise ValueError(f"{golden.path}: no tensor {kind}*; expected some in a golden step")
    for name in recorded:
        ledger.compare(results[name][0], name, results[name][1])


def _unused(jepa: Jepa, batch: MicroBatch) -> tuple[str, ...]:
    """Weights without influence on any result: the other modality's, levels that are not
    supervised, mask tokens but the first."""
    image = batch.clip.shape[2] == 1
    idle = {
        "predictor": ["video_mod_embed" if image else "img_mod_embed"]
        + [f"mask_tokens.{i}" for i in range(1, len(jepa.predictor.mask_tokens))]
    }
    for part, network, levels in (
        ("encoder", jepa.encoder, jepa.levels),
        ("target", jepa.source, jepa.target_levels),
    ):
        other = (
            ("video_mod_embed", "patch_embed") if image else ("img_mod_embed", "patch_embed_img")
        )
        norms = [f"norms_block.{i}" for i, n in enumerate(network.levels) if n not in levels]
        idle[part] = [*other, *norms]
    return tuple(
        f"{part}.{name}"
        for part, network in _parts(jepa).items()
        for name, _ in network.named_parameters()
        if any(name == start or name.startswith(f"{start}.") for start in idle[part])
    )
